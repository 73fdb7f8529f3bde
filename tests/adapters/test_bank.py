"""AdapterBank: each row of a batch as with its adapter alone; nothing compiles anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import Adapter, LoRAConfig, attach
from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.errors import AdapterMismatchError, ConfigError, ShapeError
from qlora_jax.evaluate import exact_match, row_loss, row_losses
from qlora_jax.inference import SampleConfig, generate, sample
from qlora_jax.models import Decoder
from qlora_jax.nn.multi_lora import MultiLoRA

ROUNDING = 1e-5
"""The error allowed, relative to the largest logit: that of float32 sums in another order."""
TOKENS = tiny.tokens(14, 12)
KINDS = {
    "plain": {"rank": 4},
    "few": {"rank": 2, "targets": "q_proj,down_proj", "rslora": True},
    "dora": {"rank": 3, "dora": True, "layers": (1,)},
    "biased": {"rank": 2, "bias": "all", "rank_pattern": {"up_proj": 5}},
    "head": {"rank": 2, "targets": "lm_head,q_proj"},
}


@pytest.fixture(scope="module")
def base():
    return tiny.quantized(bias=True)


@pytest.fixture(scope="module")
def models(base):
    return {name: tiny.moved(base, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def bank(base, models) -> AdapterBank:
    adapters = {name: Adapter.of(model) for name, model in models.items()}
    return AdapterBank.of(base, adapters, slots=len(adapters) + 1)


@pytest.fixture(scope="module")
def alone(base, models):
    """Logits of TOKENS by each adapter; causality gives those of any part of a row."""
    found = {name: tiny.logits(model, TOKENS) for name, model in models.items()}
    return {**found, None: tiny.logits(base, TOKENS)}


def check(model, rows, seq, alone) -> None:
    """Compares a routed model with each row's adapter by itself."""
    got = tiny.logits(model, TOKENS[: len(rows), :seq])
    want = np.stack([alone[row][i, :seq] for i, row in enumerate(rows)])
    np.testing.assert_allclose(got, want, atol=ROUNDING * np.abs(want).max())


@pytest.mark.parametrize(
    ("times", "seq"), [(1, 1), (2, 2), (2, 12)]
)  # by row, by all adapters at once, by row
def test_each_row_is_as_with_its_adapter_alone(alone, bank, times, seq):
    rows = [*KINDS, None, "plain"] * times
    check(bank.route(rows), rows, seq, alone)
    said = [alone[name][0] for name in [*KINDS, None]]
    for i, one in enumerate(said):
        assert all(np.abs(one - other).max() > 0.1 for other in said[:i])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", None])
def test_one_name_is_for_all_rows_of_any_batch(alone, bank, name):
    check(bank.route(name), [name] * 2, 12, alone)
    check(bank.route("base" if name is None else name), [name] * 3, 12, alone)


@pytest.mark.slow
def test_generate_equals_each_row_by_itself(base, models, bank):
    config = SampleConfig(max_new_tokens=5)
    rows = ["plain", "head", None]
    prompts = [[5, 9, 200], [77], [17, 18, 19]]
    new = generate(bank.route(rows), prompts, config)
    for i, row in enumerate(rows):
        model = models[row] if row else base
        assert generate(model, prompts, config)[i] == new[i]
    # Of one prompt, adapters say different things.
    said = generate(bank.route(rows), [[77]] * 3, config)
    assert len(set(map(tuple, said))) == 3


@pytest.mark.slow
def test_other_adapters_and_other_rows_compile_nothing_anew(base, bank):
    config = SampleConfig(max_new_tokens=2)
    prompts = [[1, 2], [3]]
    generate(bank.route(["plain", "dora"]), prompts, config)
    programs = (sample._prefill, sample._continue)
    compiled = [program._cache_size() for program in programs]
    other = tiny.moved(base, rank=3, targets="v_proj")
    swapped = bank.put("other", Adapter.of(other)).remove("few")
    got = generate(swapped.route([None, "other"]), prompts, config)
    again = swapped.put("plain", Adapter.of(other))  # in place of the one of its name
    replaced = generate(again.route(["plain", None]), prompts, config)
    assert [program._cache_size() for program in programs] == compiled
    assert got[1] == generate(other, prompts[1:], config)[0]
    assert replaced[0] == generate(other, prompts[:1], config)[0]
    assert swapped.adapters == tuple(
        name for name in (*KINDS, "other") if name != "few"
    )
    assert bank.adapters == tuple(KINDS)  # values: the first bank is as it was


def test_a_slot_that_is_taken_over_keeps_nothing(base, alone, bank):
    other = tiny.moved(base, rank=1, targets="v_proj")
    changed = bank.put("dora", Adapter.of(other))
    now = {**alone, "dora": tiny.logits(other, TOKENS)}
    check(changed.route(["dora", "plain"]), ["dora", "plain"], 12, now)


def test_arrays_of_the_base_are_shared_and_nothing_trains(base, bank):
    assert not nnx.to_flat_state(nnx.state(bank.model, nnx.LoRAParam))
    ours = bank.model.layers.attn.q_proj.base.quantized.codes
    assert ours is base.layers.attn.q_proj.quantized.codes


@pytest.mark.slow
def test_a_bank_is_kept_in_the_compute_dtype():
    base = tiny.quantized("bfloat16")
    models = {name: tiny.moved(base, rank=r) for name, r in (("a", 2), ("b", 4))}
    bank = AdapterBank.of(base, {n: Adapter.of(m) for n, m in models.items()})
    assert bank.model.layers.attn.q_proj.lora_a.dtype == jnp.bfloat16
    got = tiny.logits(bank.route(["a", "b"]), TOKENS[:2])
    want = [tiny.logits(models[name], TOKENS[:2])[i] for i, name in enumerate("ab")]
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


@pytest.mark.slow
def test_any_module_with_linears_can_have_a_bank():
    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = nnx.Linear(64, 48, rngs=rngs)
            self.second = nnx.Linear(48, 8, rngs=rngs)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    from qlora_jax.nn import quantize

    base = quantize(Two())
    models = {}
    for seed, name in enumerate("ab"):
        model = attach(base, LoRAConfig(rank=2), key=jax.random.key(seed))
        model.second.lora_b.set_value(jnp.full((2, 8), 0.3 * (seed + 1)))
        models[name] = model
    bank = AdapterBank.of(base, {n: Adapter.of(m) for n, m in models.items()})
    x = jax.random.normal(jax.random.key(3), (3, 64))
    got = bank.route(["b", None, "a"])(x)
    want = [models["b"](x[:1]), base(x[1:2]), models["a"](x[2:])]
    np.testing.assert_allclose(got, jnp.concatenate(want), rtol=1e-5, atol=1e-5)


# --- Evaluation -----------------------------------------------------------------------


def routed_rows():
    data = tiny.rows([6, 9, 7, 5, 8, 6, 9])
    names = ["plain", None, "head", "plain", "head", "head", "plain"]
    data.rows = [
        row._replace(adapter=name) for row, name in zip(data.rows, names, strict=True)
    ]
    return data


@pytest.mark.slow
def test_row_losses_are_those_of_each_adapter_by_itself(base, models, bank):
    data = routed_rows()
    losses = row_losses(bank, data, batch_size=3)
    for name in ("plain", "base", "head"):
        picked = [
            i for i, row in enumerate(data.rows) if (row.adapter or "base") == name
        ]
        mine = tiny.rows([5])
        mine.rows = [data.rows[i] for i in picked]
        want, tokens = row_loss(models.get(name, base), mine, batch_size=2)
        theirs = losses.of(picked)
        assert theirs.tokens == tokens
        assert theirs.loss.value == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_exact_match_answers_each_row_with_its_adapter(base, models, bank):
    data, tokenizer = routed_rows(), tiny.tokenizer()
    _, together = exact_match(bank, data, tokenizer, batch_size=4, max_new_tokens=4)
    for name in ("plain", None):
        mine = [i for i, row in enumerate(data.rows) if row.adapter == name]
        prompts = [data.rows[i].tokens[: data.rows[i].prompt].tolist() for i in mine]
        model = models[name] if name else base
        config = SampleConfig(max_new_tokens=4)
        new = generate(model, prompts, config, eos_ids=tokenizer.eos_ids)
        given = [together[i].given for i in mine]
        assert given == [tokenizer.decode(ids) for ids in new]


# --- Bad input ------------------------------------------------------------------------


def small(base, **config) -> Adapter:
    return Adapter.of(tiny.moved(base, **({"rank": 2, "targets": "q_proj"} | config)))


def test_rows_of_unknown_adapters_are_refused(bank):
    with pytest.raises(ConfigError, match=r"no adapter 'plian'; did you mean plain\?"):
        bank.route(["plain", "plian"])
    with pytest.raises(
        ConfigError, match="no adapter 'zzz'; there are base, plain, few"
    ):
        bank.route("zzz")
    with pytest.raises(ConfigError, match="no adapter 'gone'"):
        bank.remove("gone")


def test_a_batch_of_another_size_than_its_rows_is_refused(bank):
    with pytest.raises(ShapeError, match="chosen for 2 rows, the batch has 3"):
        tiny.logits(bank.route(["plain", None]), tiny.tokens(3, 4))


def test_what_does_not_fit_the_slots_is_refused_by_name(base):
    bank = AdapterBank.of(base, {"a": small(base)}, slots=2)
    with pytest.raises(AdapterMismatchError) as refused:
        bank.put("b", small(base, rank=3, targets="q_proj,k_proj"))
    said = str(refused.value)
    assert "layers.attn.q_proj: rank 3, there is room for 2" in said
    assert "layers.attn.k_proj: no adapter of the bank had one here" in said
    with pytest.raises(AdapterMismatchError, match="DoRA, and no adapter of the bank"):
        bank.put("b", small(base, dora=True))
    with pytest.raises(AdapterMismatchError, match="a trained bias, and no adapter"):
        bank.put("b", small(base, bias="lora_only"))
    full = bank.put("b", small(base))
    with pytest.raises(ConfigError, match="all 2 slots are taken, by a, b; remove one"):
        full.put("c", small(base))
    assert full.remove("a").put("c", small(base)).adapters == ("c", "b")
    roomy = AdapterBank.of(base, {"a": small(base)}, slots=2, rank=8)
    assert roomy.put("b", small(base, rank=7)).adapters == ("a", "b")


def test_parts_that_rows_cannot_choose_are_named_all_at_once(base):
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), small(base))
    adapters = {
        "a": small(base),
        "broken": broken,
        "rows": small(base, tokens=(3, 4)),
        "saved": small(base, modules_to_save="norm"),
        "table": small(base, targets="q_proj,embed_tokens"),
    }
    with pytest.raises(AdapterMismatchError) as refused:
        AdapterBank.of(base, adapters)
    for line in (
        "broken: layers.attn.q_proj.lora_a, layers.attn.q_proj.lora_b: NaN or Inf",
        "rows: rows of a batch cannot choose embed_tokens",
        "saved:",
        "table:",
    ):
        assert line in str(refused.value)
    assert "merge this adapter, or use it alone" in str(refused.value)


def test_experts_are_refused():
    config = dataclasses.replace(tiny.CONFIG, num_experts=4)
    base = Decoder(config, key=jax.random.key(0), dtype="float32")
    with pytest.raises(AdapterMismatchError, match="cannot choose layers.mlp.experts"):
        AdapterBank.of(base, {"a": Adapter.of(tiny.moved(base, rank=2))})


def test_an_adapter_of_another_base_is_refused(base):
    other = tiny.quantized(bias=True, seed=7)
    with pytest.raises(AdapterMismatchError, match=r"far: .*other weights"):
        AdapterBank.of(base, {"a": small(base), "far": small(other)})


@pytest.mark.parametrize(
    ("names", "slots", "message"),
    [
        ([], None, "at least one adapter"),
        (["a", "b"], 1, "2 adapters do not fit into 1 slots"),
        (["base"], None, "'base' is no name for an adapter"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(base, names, slots, message):
    one = small(base)
    with pytest.raises(ConfigError, match=message):
        AdapterBank.of(base, dict.fromkeys(names, one), slots=slots)


def test_a_model_with_an_adapter_is_no_base(base):
    with pytest.raises(AdapterMismatchError, match="has an adapter of its own"):
        AdapterBank.of(tiny.moved(base), {"a": small(base)})


def test_only_adapted_linears_have_slots(base):
    bank = AdapterBank.of(base, {"a": small(base)})
    paths = [p for p, n in nnx.iter_graph(bank.model) if isinstance(n, MultiLoRA)]
    assert paths == [("layers", "attn", "q_proj")]
