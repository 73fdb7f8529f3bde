"""attach, split and join: pure, by path, and with the adapter alone to train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import LoRAConfig, attach, join, split
from qlora_jax.adapters.attached import base_fingerprint, lora_config
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.nn import FrozenParam, LoRA, quantize

KEY = jax.random.key(0)
ATTENTION = {f"layers.attn.{name}_proj" for name in "qkvo"}
MLP = {f"layers.mlp.{name}_proj" for name in ("gate", "up", "down")}


def adapters(model: nnx.Module) -> dict[str, LoRA]:
    found = [(p, node) for p, node in nnx.iter_graph(model) if isinstance(node, LoRA)]
    return {".".join(map(str, path)): node for path, node in found}


def test_attach_leaves_the_model_it_was_given_as_it_was():
    model = tiny.quantized()
    before = nnx.split(model)
    attached = attach(model, LoRAConfig(rank=4), key=KEY)
    after = nnx.split(model)
    assert adapters(attached) and not adapters(model)
    assert before[0] == after[0]
    leaves = zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True)
    assert all(one is other for one, other in leaves)


@pytest.mark.parametrize("base", [tiny.decoder, tiny.quantized])
def test_a_new_adapter_changes_no_logit(base):
    x = tiny.tokens()
    attached = tiny.adapted(base(), zero=True)
    np.testing.assert_array_equal(tiny.logits(attached, x), tiny.logits(base(), x))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ATTENTION | MLP),
        ("q_proj,v_proj", {"layers.attn.q_proj", "layers.attn.v_proj"}),
        ("q_proj, down_proj", {"layers.attn.q_proj", "layers.mlp.down_proj"}),
        (r"layers\.mlp\..*", MLP),
        (r".*\.(q|k)_proj", {"layers.attn.q_proj", "layers.attn.k_proj"}),
        ("layers.attn.o_proj", {"layers.attn.o_proj"}),
        (("o_proj", "k_proj"), {"layers.attn.o_proj", "layers.attn.k_proj"}),
        (r"layers\.attn\..{1,6}", {f"layers.attn.{x}_proj" for x in "qkvo"}),
        ("layers.attn.._proj", {f"layers.attn.{x}_proj" for x in "qkvo"}),
        ("lm_head,q_proj", {"lm_head", "layers.attn.q_proj"}),
    ],
)
def test_targets_choose_linears(targets, expected):
    config = LoRAConfig(rank=2, targets=targets)
    assert set(adapters(attach(tiny.decoder(), config, key=KEY))) == expected


def test_targets_that_match_nothing_name_near_matches():
    config = LoRAConfig(targets="q_prj,gate")
    message = (
        r"--lora\.targets 'q_prj,gate' matches no linear; near: .*q_proj.*gate_proj"
    )
    with pytest.raises(ConfigError, match=message):
        attach(tiny.decoder(), config, key=KEY)
    with pytest.raises(ConfigError, match=r"paths such as layers\.attn\."):
        attach(tiny.decoder(), LoRAConfig(targets="zzz"), key=KEY)
    for other in ("all-linear", r".*\.k_proj"):
        config = LoRAConfig(targets=("q_proj", other))
        with pytest.raises(ConfigError, match="expressions stand alone"):
            attach(tiny.decoder(), config, key=KEY)


def test_a_model_of_plain_flax_linears_is_told_to_quantize_first():
    with pytest.raises(ConfigError, match=r"call quantize\(model\) first"):
        attach(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), key=KEY)


def test_attaching_twice_is_refused():
    attached = attach(tiny.decoder(), LoRAConfig(targets="k_proj"), key=KEY)
    with pytest.raises(AdapterMismatchError, match=r"adapter at layers\.attn\.k_proj"):
        attach(attached, LoRAConfig(targets="q_proj"), key=KEY)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "--lora.rank is 0, expected at least 1"),
        ({"alpha": 0.0}, "--lora.alpha is 0.0, expected more than 0"),
        ({"alpha": float("nan")}, "--lora.alpha is nan"),
        ({"dropout": 1.0}, "--lora.dropout is 1.0, expected 0 <= p < 1"),
        ({"dropout": -0.1}, "--lora.dropout is -0.1"),
        ({"targets": "q_proj("}, r"--lora.targets 'q_proj\(' is no pattern"),
    ],
)
def test_a_wrong_lora_config_names_the_flag(wrong, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**wrong)


def test_all_problems_of_a_lora_config_come_at_once():
    with pytest.raises(ConfigError, match=r"lora\.rank.*lora\.alpha.*lora\.dropout"):
        LoRAConfig(rank=0, alpha=-1.0, dropout=2.0)


def test_initial_values_follow_from_key_and_path_alone():
    every = adapters(attach(tiny.decoder(), LoRAConfig(rank=4), key=KEY))
    few = LoRAConfig(rank=4, targets="q_proj")
    one = adapters(attach(tiny.quantized(), few, key=KEY))
    other = adapters(attach(tiny.decoder(), few, key=jax.random.key(1)))
    path = "layers.attn.q_proj"
    q = np.asarray(every[path].lora_a[...])
    np.testing.assert_array_equal(q, one[path].lora_a[...])
    assert not np.array_equal(q, other[path].lora_a[...])
    assert not np.array_equal(q, every["layers.attn.o_proj"].lora_a[...])
    assert not np.array_equal(q[0], q[1])  # nor do two layers of a stack share values


def test_factors_are_float32_and_initialised_as_peft_does():
    lora = adapters(tiny.adapted(tiny.quantized("bfloat16"), zero=True, rank=8))
    down = lora["layers.mlp.down_proj"]
    a, b = np.asarray(down.lora_a[...]), np.asarray(down.lora_b[...])
    assert a.dtype == b.dtype == np.float32
    assert a.shape == (2, 128, 8) and b.shape == (2, 8, 64)
    bound = 1 / np.sqrt(128)  # kaiming_uniform with a = sqrt(5)
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not b.any()


def test_join_undoes_split():
    model = tiny.adapted(tiny.quantized())
    joined = join(*split(model))
    assert nnx.split(joined)[0] == nnx.split(model)[0]
    for one, other in zip(
        tiny.arrays(nnx.state(joined)), tiny.arrays(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_split_keeps_the_adapter_and_the_frozen_apart():
    model = tiny.adapted(tiny.quantized())
    _, lora, base = split(model)
    lora_variables = [v for _, v in nnx.to_flat_state(lora)]
    base_variables = [v for _, v in nnx.to_flat_state(base)]
    assert len(lora_variables) == 2 * 7
    assert all(type(v) is nnx.LoRAParam for v in lora_variables)
    assert all(type(v) is FrozenParam for v in base_variables)
    # What a stock flax trainer would train (contract C4).
    trained = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert [path for path, _ in trained] == [
        path for path, _ in nnx.to_flat_state(lora)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {np.dtype(np.float32)}


def test_split_of_a_model_without_adapter_is_refused():
    with pytest.raises(AdapterMismatchError, match="no adapter to train; call attach"):
        split(tiny.decoder())


def test_only_the_adapter_is_differentiated():
    graphdef, lora, base = split(tiny.adapted(tiny.quantized()))
    x = tiny.tokens()
    grads = jax.jit(
        jax.grad(lambda lora: jnp.mean(join(graphdef, lora, base)(x) ** 2))
    )(lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert all(np.abs(g).max() > 0 for g in tiny.arrays(grads))


def test_lora_config_describes_what_is_attached():
    config = LoRAConfig(rank=3, alpha=6.0, dropout=0.25, targets="q_proj,up_proj")
    model = attach(tiny.decoder(), config, key=KEY)
    said = lora_config(model)
    assert (said.rank, said.alpha, said.dropout) == (3, 6.0, 0.25)
    assert said.targets == ("layers.attn.q_proj", "layers.mlp.up_proj")
    again = attach(tiny.decoder(), said, key=KEY)
    assert set(adapters(again)) == set(adapters(model))
    with pytest.raises(AdapterMismatchError, match="has no adapter"):
        lora_config(tiny.decoder())


def test_an_adapter_carries_the_fingerprint_of_its_base():
    import json

    _, lora, _ = split(tiny.adapted(tiny.quantized()))
    assert base_fingerprint(lora) == json.loads(fingerprint(tiny.quantized()))
    plain = jax.tree.map(lambda x: x, nnx.State({"lora_a": nnx.LoRAParam(jnp.ones(2))}))
    assert base_fingerprint(plain) is None


def test_attach_works_on_a_strangers_quantized_module():
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(64, 32, rngs=rngs)
            self.second = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    model = quantize(Two(nnx.Rngs(0)))
    attached = attach(model, LoRAConfig(rank=2), key=KEY)
    assert set(adapters(attached)) == {"first", "second"}
    x = jnp.ones((3, 64))
    np.testing.assert_array_equal(attached(x), model(x))
