"""What else an adapter can train: magnitudes, biases, whole modules, some layers, rows.

That they equal PEFT's is in test_peft_variants.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import LoRAConfig, attach, join, split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.compensate import input_moments
from qlora_jax.adapters.names import flatten
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.models import Decoder
from qlora_jax.nn import LoRA
from qlora_jax.nn.dora import adapted_norms, row_norms
from qlora_jax.train.optimizer import make_optimizer
from qlora_jax.train.step import make_train_step

KEY = jax.random.key(0)
ORDER = 1e-5
"""Relative; float32 sums in another order."""
EVERYTHING: dict[str, Any] = {
    "dora": True,
    "bias": "all",
    "modules_to_save": "norm,layers.mlp_norm,lm_head",
    "tokens": (7, 3),
    "head_tokens": (),
    "rank": 4,
}


def step(model: nnx.Module, steps: int = 1, **config: Any) -> tuple[Any, Any]:
    """Returns what trains, before and after steps."""
    graphdef, lora, base = split(model)
    before = jax.tree.map(jnp.copy, lora)
    tx = make_optimizer(TrainConfig(learning_rate=1e-2, **config), 10)
    train_step = make_train_step(graphdef, tx, checkpoint="layer")
    ids = tiny.tokens().at[:, 2].set(7)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape, jnp.float32)}
    state = tx.init(lora)
    lora = jax.tree.map(jnp.copy, lora)  # the step donates it
    for _ in range(steps):
        lora, state, _ = train_step(lora, base, state, batch)
    return before, lora


@pytest.mark.slow
def test_everything_that_trains_moves_and_nothing_else():
    model = attach(tiny.quantized(bias=True), LoRAConfig(**EVERYTHING), key=KEY)
    frozen = tiny.frozen(model)
    before, after = (flatten(x) for x in step(model, 2))
    still = [name for name in before if (before[name] == after[name]).all()]
    assert still == []
    names = {name.rpartition(".")[2] for name in before}
    assert names == {
        "lora_a",
        "lora_b",
        "magnitude",
        "bias",
        "weight",
        "kernel",
        "rows",
    }
    for one, other in zip(frozen, tiny.frozen(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {x.dtype for x in before.values()} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_none_of_it_changes_a_logit_before_it_trains(dtype):
    base = tiny.quantized(dtype, bias=True)
    model = attach(base, LoRAConfig(**EVERYTHING), key=KEY)
    said, wanted = (tiny.logits(m, tiny.tokens()) for m in (model, base))
    # The magnitude divided by the norm is 1 but for the rounding of a sum.
    size = np.abs(wanted).max() * (ORDER if dtype == "float32" else 2**-6)
    np.testing.assert_allclose(said, wanted, atol=size, rtol=0)


@pytest.mark.slow
def test_only_matrices_decay():
    config = EVERYTHING | {"modules_to_save": "norm", "head_tokens": None}
    model = attach(tiny.decoder(bias=True), LoRAConfig(**config), key=KEY)
    plain, decayed = (
        flatten(step(model, weight_decay=decay)[1]) for decay in (0.0, 0.5)
    )
    moved = {
        name.rpartition(".")[2]
        for name in plain
        if not (plain[name] == decayed[name]).all()
    }
    assert moved == {"lora_a", "rows"}  # lora_b is zero yet


@pytest.mark.slow
def test_layers_without_adapter_stay_as_they_were():
    config = LoRAConfig(rank=4, layers=(1,), dora=True)
    model = attach(tiny.quantized(), config, key=KEY)
    before, after = step(model, 3)
    assert {name.split(".")[1] for name in flatten(after)} == {"1"}
    for path, variable in nnx.to_flat_state(after):
        if path[-1] in ("lora_b", "magnitude"):
            first = variable.get_value()[0]
            start = dict(nnx.to_flat_state(before))[path].get_value()[0]
            np.testing.assert_array_equal(first, start)


def test_norms_of_adapted_rows_are_those_of_the_sum():
    linear = jax.tree.map(lambda leaf: leaf[0], nnx.split(tiny.quantized().layers)[1])
    layer = nnx.merge(nnx.graphdef(tiny.quantized().layers), linear)
    base = layer.mlp.up_proj
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((64, 4), (4, base.out_features))
    )
    w = np.asarray(base.weight("float32"), np.float64)
    wanted = np.linalg.norm(w + 0.3 * (np.float64(a) @ np.float64(b)).T, axis=1)
    np.testing.assert_allclose(row_norms(base, a, b, 0.3), wanted, rtol=ORDER)
    squared = row_norms(base) ** 2
    said = adapted_norms(base, squared, a, b, 0.3, jnp.dtype("float32"))
    np.testing.assert_allclose(said, wanted, rtol=ORDER)


@pytest.mark.slow
def test_dora_begins_at_the_norms_of_what_compensation_made():
    base, dense = tiny.quantized(), tiny.decoder()
    moments = input_moments(base, [tiny.tokens(4, 32)])
    config = LoRAConfig(rank=8, init="qera", dora=True)
    one = attach(base, config, key=KEY, original=dense, moments=moments)
    other = attach(
        base,
        dataclasses.replace(config, dora=False),
        key=KEY,
        original=dense,
        moments=moments,
    )
    said, wanted = (tiny.logits(m, tiny.tokens()) for m in (one, other))
    size = 10 * ORDER * np.abs(wanted).max()
    np.testing.assert_allclose(said, wanted, atol=size, rtol=0)


@pytest.mark.slow
def test_dropout_leaves_the_linears_own_part_alone():
    base = tiny.quantized()
    model = tiny.adapted(base, dora=True, dropout=0.5, targets="q_proj")
    key = jax.random.key(1)
    q = model.layers.attn.q_proj
    assert isinstance(q, LoRA) and q.magnitude is not None
    hidden = lambda m, k: m.hidden_states(tiny.tokens(), key=k)  # noqa: E731
    one, other = hidden(model, key), hidden(model, None)
    assert not np.allclose(one, other)
    zero = tiny.adapted(base, dora=True, dropout=0.5, targets="q_proj", zero=True)
    np.testing.assert_array_equal(hidden(zero, key), hidden(zero, None))


def test_the_config_is_read_off_the_model():
    config = LoRAConfig(**EVERYTHING, targets="q_proj")
    said = lora_config(attach(tiny.quantized(bias=True), config, key=KEY))
    for name in ("dora", "bias", "tokens", "head_tokens", "rank"):
        assert getattr(said, name) == getattr(config, name), name
    assert set(said.modules_to_save) == set(config.modules_to_save)
    assert LoRAConfig.from_json({"layers": [1], "tokens": []}).layers == (1,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"modules_to_save": "wte"},
            "modules-to-save wte is none; there are embed_tok",
        ),
        (
            {"modules_to_save": "q_proj"},
            "q_proj is quantized, and only dense modules train",
        ),
        ({"layers": (0, 2)}, r"--lora.layers \[0, 2\]: the model has 2 layers, from 0"),
        ({"tokens": (3, 272)}, r"--lora.tokens \[272\]: the vocabulary has 272"),
        ({"targets": "embed_tokens", "tokens": (3,)}, "exclude each other"),
        ({"targets": "lm_head", "tokens": (3,)}, "an adapter on lm_head exclude each"),
        (
            {"targets": "embed_tokens", "dora": True},
            "dora has no form for embed_tokens",
        ),
    ],
)
def test_what_a_model_has_no_place_for_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        attach(tiny.quantized(), LoRAConfig(**config), key=KEY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": (1, 1)}, "expected different numbers from 0"),
        ({"tokens": (-1,)}, "expected different numbers from 0"),
        ({"layers": (1,), "bias": "lora_only"}, "does not go with --lora.layers"),
        ({"modules_to_save": "embed_tokens", "tokens": (1,)}, "give one of them"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**config)


def test_head_tokens_of_a_tied_head_are_refused():
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    model = Decoder(config, key=KEY, dtype="float32")
    with pytest.raises(ConfigError, match="the head is tied and follows"):
        attach(model, LoRAConfig(tokens=(1,), head_tokens=(2,)), key=KEY)


def test_any_optax_transform_updates_it():
    model = attach(tiny.decoder(), LoRAConfig(**EVERYTHING), key=KEY)
    graphdef, lora, base = split(model)
    updated = optax.apply_updates(lora, jax.tree.map(jnp.ones_like, lora))
    assert tiny.logits(join(graphdef, updated, base), tiny.tokens()).shape[-1] == 272
