"""combine: exact sums, PEFT's methods in float64, and results that are adapters.

That the methods equal PEFT's is in test_combine_golden.py.
"""

from pathlib import Path

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.adapters import merge, split
from qlora_jax.adapters.algebra import scale, update_norms
from qlora_jax.adapters.combine import METHODS, _largest_magnitudes, combine
from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.train.step import make_train_step

EXACT = 1e-6
"""Relative; what rounding to float32 leaves of an identity."""
SVD = 1e-5
"""Relative; float32 SVDs."""
LOGITS = 2e-5
"""Absolute; float32 sums in another order."""
ON_FACTORS = tuple(m for m in METHODS if m not in ("concat",) and "svd" not in m)
KEY = jax.random.key(0)
SQUARE = {"layers.attn.q_proj": (3, 12, 12)}
TOKENS = tiny.tokens()
some = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)
weights = st.floats(-2, 2, width=32)
alphas = st.sampled_from([1.0, 4.0, 30.0])


@some
@given(seeds, st.tuples(weights, weights, weights), alphas, st.booleans())
def test_concat_is_the_weighted_sum_of_the_updates(seed, three, alpha, rslora):
    adapters = [
        drawn.adapter(seed),
        drawn.adapter(seed ^ 1, rank=2, alpha=alpha, rslora=rslora),
        drawn.adapter(seed ^ 2, shapes={"lm_head": (10, 12)}, rank=5),
    ]
    made = combine(adapters, three)
    # Of the parts' sizes: they may cancel.
    parts = [scale(a, abs(w)) for a, w in zip(adapters, three, strict=True)]
    size = sum(float(update_norms(part).total) for part in parts)
    wanted = drawn.weighted(adapters, list(three))
    for name, update in drawn.updates(made).items():
        assert np.linalg.norm(update - wanted[name]) <= EXACT * size
    assert made.config.shape_of("layers.attn.q_proj") == (5, 5.0)
    assert made.config.shape_of("lm_head") == (10, 10.0)


def test_svd_is_the_best_approximation_of_the_sum():
    adapters = [drawn.adapter(0), drawn.adapter(1, rank=4, alpha=9.0)]
    made = drawn.updates(combine(adapters, [0.7, -0.4], "svd"))
    for name, update in drawn.weighted(adapters, [0.7, -0.4]).items():
        u, values, vh = np.linalg.svd(update, full_matrices=False)
        best = (u[:, :4] * values[:4]) @ vh[:4]
        assert np.linalg.norm(made[name] - best) <= SVD * np.linalg.norm(update)
    config = combine(adapters, [0.7, -0.4], "svd", rank=2).config
    assert (config.rank, config.alpha, config.rank_pattern) == (2, 2.0, {})


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_of_weight_one_is_itself(method):
    adapter = drawn.adapter(init="loftq", dora=True)
    assert combine([adapter], [1.0], method, key=KEY) is adapter


def test_one_adapter_alone_is_scaled_and_takes_a_rank():
    adapter = drawn.adapter()
    made = combine([adapter], [-2.0], "ties", density=0.5)
    drawn.assert_near(drawn.updates(made), drawn.weighted([adapter], [-2.0]), EXACT)
    assert combine([adapter], [1.0], "svd", rank=2).config.rank == 2


def test_linear_has_the_sign_of_a_weight_in_lora_a():
    a, b = drawn.adapter(shapes=SQUARE), drawn.adapter(1, shapes=SQUARE, alpha=6.0)
    made = nnx.to_pure_dict(combine([a, b], [0.5, -2.0], "linear").lora)
    parts = [nnx.to_pure_dict(x.lora)["layers"]["attn"]["q_proj"] for x in (a, b)]
    roots = [np.sqrt(0.5 * 4 / 3), np.sqrt(2.0 * 6 / 3)]
    for factor, sign in (("lora_a", -1), ("lora_b", 1)):
        wanted = roots[0] * parts[0][factor] + sign * roots[1] * parts[1][factor]
        have = made["layers"]["attn"]["q_proj"][factor]
        np.testing.assert_allclose(have, wanted, atol=1e-6)


def test_density_one_prunes_nothing():
    a, b = drawn.adapter(shapes=SQUARE), drawn.adapter(1, shapes=SQUARE)
    wanted = drawn.updates(combine([a, b], [0.5, -1.0], "linear"))
    made = combine([a, b], [0.5, -1.0], "magnitude_prune")
    drawn.assert_near(drawn.updates(made), wanted, EXACT)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
def test_ties_elects_signs_and_averages_those_that_have_them(majority_sign):
    adapters = [drawn.adapter(i, shapes=SQUARE) for i in range(3)]
    made = combine(
        adapters, [1.0, 2.0, 0.5], "ties_svd", rank=12, majority_sign=majority_sign
    )
    for name, update in drawn.updates(made).items():
        parts = np.stack([drawn.updates(adapter)[name] for adapter in adapters])
        votes = parts if majority_sign == "total" else np.sign(parts)
        agree = np.sign(parts) == np.where(votes.sum(0) >= 0, 1, -1)
        mean = (np.array([1.0, 2.0, 0.5])[:, None, None] * parts * agree).sum(0)
        wanted = mean / np.maximum(agree.sum(0), 1)
        assert np.linalg.norm(update - wanted) <= SVD * np.linalg.norm(wanted)


def test_magnitude_prune_keeps_the_largest_entries_of_each_layer():
    adapter = drawn.adapter(shapes=SQUARE)
    made = combine(
        [adapter] * 2, [0.5, 0.5], "magnitude_prune_svd", rank=12, density=0.3
    )
    for name, update in drawn.updates(made).items():
        whole = drawn.updates(adapter)[name]
        kept = np.sort(np.abs(whole), axis=None)[-int(0.3 * whole.size) :]
        wanted = np.where(np.abs(whole) >= kept[0], whole, 0)
        assert np.linalg.norm(update - wanted) <= SVD * np.linalg.norm(wanted)


@pytest.mark.parametrize("count", [0, 1, 7, 20, 35])
def test_the_largest_magnitudes_are_those_of_a_stable_sort(count):
    x = np.random.default_rng(0).integers(-3, 4, (5, 7)).astype(np.float32)
    x[0] *= 1e-40  # below the normal numbers
    order = np.argsort(-np.abs(x).reshape(-1), kind="stable")
    wanted = np.isin(np.arange(x.size), order[:count]).reshape(x.shape)
    np.testing.assert_array_equal(_largest_magnitudes(jnp.asarray(x), count), wanted)


def test_dare_keeps_its_part_at_random_and_the_mean_stays():
    shapes = {"layers.attn.q_proj": (2, 64, 64)}
    adapters = [drawn.adapter(i, shapes=shapes, rank=4) for i in range(2)]

    def draw(method: str, key: jax.Array) -> Adapter:
        return combine(adapters, [1.0, 1.0], method, density=0.25, key=key)

    factors = [jax.tree.leaves(x.lora) for x in adapters]
    made = jax.tree.leaves(draw("dare_linear", KEY).lora)
    root = np.sqrt(4.0 / 4)
    for have, one, other in zip(made, *factors, strict=True):
        # Each entry is 4 times the sum of those that stayed.
        sums = [0 * one, 4 * one, 4 * other, 4 * (one + other)]
        gaps = np.abs(np.stack([have - root * s for s in sums]))
        assert gaps.min(0).max() < 1e-5
        assert np.bincount(gaps.argmin(0).ravel(), minlength=4) / have.size == (
            pytest.approx([9 / 16, 3 / 16, 3 / 16, 1 / 16], abs=0.06)
        )
    again = jax.tree.leaves(draw("dare_linear", KEY).lora)
    other = jax.tree.leaves(draw("dare_linear", jax.random.key(1)).lora)
    assert all((x == y).all() for x, y in zip(made, again, strict=True))
    assert not any((x == y).all() for x, y in zip(made, other, strict=True))
    layers = np.asarray(made[0] != 0)
    assert (layers[0] != layers[1]).any()


def test_dare_ties_svd_draws_in_the_updates():
    adapter = drawn.adapter(shapes=SQUARE)
    made = combine(
        [adapter] * 2, [1.0, 1.0], "dare_ties_svd", rank=12, density=0.5, key=KEY
    )
    for name, update in drawn.updates(made).items():
        whole = drawn.updates(adapter)[name]
        # Signs agree, so it is the mean of those that stayed: 2 times the entry, or 0.
        ratio = update / whole
        gap = np.abs(np.minimum(np.abs(ratio), np.abs(ratio - 2)) * whole)
        assert gap.max() < SVD * np.linalg.norm(whole)
        assert 0.5 < np.mean(ratio > 1) < 0.95  # 3 of 4 keep one at least


def test_a_linear_that_only_some_have_is_combined_of_those():
    both = drawn.LINEARS
    a = drawn.adapter(0, shapes={"lm_head": both["lm_head"]})
    b = drawn.adapter(1, shapes=both)
    for method in ("linear", "svd", "ties", "magnitude_prune_svd"):
        made = combine([a, b], [0.5, 2.0], method)
        alone = "layers.1.attn.q_proj"
        wanted = 2 * drawn.updates(b)[alone]
        error = np.linalg.norm(drawn.updates(made)[alone] - wanted)
        assert error <= SVD * np.linalg.norm(wanted), method
        assert made.config.targets == ("layers.attn.q_proj", "lm_head")


def test_layers_of_the_result_are_those_of_any():
    a, b = drawn.adapter(0, layers=(0,)), drawn.adapter(1, layers=(2,))
    made = combine([a, b], [1.0, -1.0])
    assert made.config.layers == (0, 2)
    drawn.assert_near(drawn.updates(made), drawn.weighted([a, b], [1.0, -1.0]), EXACT)
    whole = combine([a, drawn.adapter(2)], [1.0, 1.0], "ties", density=0.5)
    assert whole.config.layers == () and len(drawn.updates(whole)) == 4
    # An adapter without layers of its own says nothing of them.
    head = drawn.adapter(3, shapes={"lm_head": (10, 12)})
    assert combine([head, b], [1.0, 1.0]).config.layers == (2,)


def test_methods_on_factors_need_equal_ranks_and_name_each_that_differs():
    a, b = drawn.adapter(), drawn.adapter(1, rank=4)
    for method in ON_FACTORS:
        with pytest.raises(AdapterMismatchError) as error:
            combine([a, b], [1.0, 1.0], method, key=KEY)
        text = str(error.value)
        assert f"{method} works on the factors, which needs equal ranks" in text
        assert "layers.attn.q_proj: rank 3 in adapter 0, 4 in adapter 1" in text
        assert "lm_head: rank 3 in adapter 0, 4 in adapter 1" in text
    assert combine([a, b], [1.0, 1.0], "ties_svd").config.rank == 4


def test_arguments_that_do_not_fit_are_all_named():
    a, b = drawn.adapter(), drawn.adapter(1)
    with pytest.raises(ConfigError) as error:
        combine(
            [a, b], [1.0, float("inf"), 2.0], "tie", density=0.0, majority_sign="all"
        )
    text = str(error.value)
    assert "there are 3 weights for 2 adapters" in text
    assert "weight 1 is inf, expected a finite number" in text
    assert "method 'tie' is none of concat" in text and "did you mean ties?" in text
    assert "density is 0.0, expected 0 < density <= 1" in text
    assert "majority_sign is 'all', expected total or frequency" in text
    for message, method, options in (
        ("rank goes with svd", "concat", {"rank": 3}),
        ("density goes with ties", "svd", {"density": 0.5}),
        ("dare_ties draws at random; give a key", "dare_ties", {}),
        ("rank is 0, expected at least 1", "svd", {"rank": 0}),
        (r"rank 11 is above min\(in, out\)", "ties_svd", {"rank": 11}),
    ):
        with pytest.raises(ConfigError, match=message):
            combine([a, b], [1.0, 1.0], method, **options)
    with pytest.raises(ConfigError, match="2 problems"):
        combine([a, b], [1.0, 1.0], "concat", rank=3, density=0.5)
    with pytest.raises(ConfigError, match="there are no adapters"):
        combine([], [])


def test_adapters_that_hold_a_part_of_their_base_need_weights_that_sum_to_one():
    a, b = drawn.adapter(init="qera"), drawn.adapter(1, init="qera")
    assert combine([a, b], [0.25, 0.75], "svd").config.init == "qera"
    with pytest.raises(ConfigError, match="weights sum to 2, .* would hold it 2 times"):
        combine([a, b], [1.0, 1.0])
    with pytest.raises(
        ConfigError, match="linear is no weighted sum that would keep it"
    ):
        combine([a, b], [0.5, 0.5], "linear")
    with pytest.raises(ConfigError, match="init qera, zero"):
        combine([a, drawn.adapter()], [0.5, 0.5])


def test_combine_can_be_traced_and_differentiated_in_the_weights():
    a, b = drawn.adapter(shapes=SQUARE), drawn.adapter(1, shapes=SQUARE)

    def total(w: jax.Array, method: str) -> jax.Array:
        made = combine([a, b], [w[0], w[1]], method)
        return jnp.sum(jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(made.lora)]))

    w = jnp.array([0.7, -0.4])
    for method in ("concat", "linear"):
        slope = jax.jit(jax.grad(total), static_argnums=1)(w, method)
        for i in range(2):
            step = jnp.zeros(2).at[i].set(1e-2)
            rise = (total(w + step, method) - total(w - step, method)) / 2e-2
            assert float(slope[i]) == pytest.approx(float(rise), rel=1e-3)
    traced = jax.jit(lambda x, y: combine([x, y], [1.0, 1.0], "ties_svd", density=0.5))(
        a, b
    )
    wanted = combine([a, b], [1.0, 1.0], "ties_svd", density=0.5)
    assert traced.config == wanted.config
    drawn.assert_near(drawn.updates(traced), drawn.updates(wanted), SVD)


@pytest.fixture(scope="module")
def pair() -> list[Adapter]:
    base = tiny.decoder()
    return [
        Adapter.of(tiny.moved(base, targets="embed_tokens,q_proj")),
        Adapter.of(
            tiny.adapted(base, targets="q_proj,o_proj", rank=2, rslora=True, seed=6)
        ),
    ]


@pytest.fixture(scope="module")
def combined(pair: list[Adapter]) -> Adapter:
    return combine(pair, [0.7, -0.4])


def test_the_result_is_what_its_config_says(combined: Adapter):
    model = combined.on(tiny.decoder())
    again = Adapter.of(model)
    for field in (
        "rank",
        "alpha",
        "rslora",
        "rank_pattern",
        "alpha_pattern",
        "targets",
    ):
        assert getattr(again.config, field) == getattr(combined.config, field), field
    assert jax.tree.structure(again.lora) == jax.tree.structure(combined.lora)
    jax.tree.map(np.testing.assert_array_equal, again.lora, combined.lora)


def test_the_result_merges_to_the_weighted_sum(pair, combined: Adapter):
    base = tiny.decoder()
    merged = merge(combined.on(base), dtype="float32")
    wanted = drawn.weighted(pair, [0.7, -0.4])
    table = merged.embed_tokens.weight[...] - base.embed_tokens.weight[...]
    assert np.abs(table).max() > 0.01
    np.testing.assert_allclose(table, wanted["embed_tokens"], atol=1e-6)
    kernels = (m.layers.attn.o_proj.kernel[...][1].T for m in (merged, base))
    update = np.subtract(*kernels)
    np.testing.assert_allclose(update, wanted["layers.1.attn.o_proj"], atol=1e-6)


def test_the_result_is_saved_exported_and_read_again(combined: Adapter, tmp_path: Path):
    folder = save_adapter(tmp_path / "ours", combined.lora, combined.config)
    model = combined.on(tiny.decoder())
    theirs = export_peft(tmp_path / "peft", model)
    wanted = tiny.logits(model, TOKENS)
    assert np.abs(wanted - tiny.logits(tiny.decoder(), TOKENS)).max() > 0.01
    for again in (
        load_adapter(folder, tiny.decoder()),
        import_peft(theirs, tiny.decoder()),
    ):
        np.testing.assert_allclose(tiny.logits(again, TOKENS), wanted, atol=LOGITS)


def test_the_result_trains_on(combined: Adapter):
    graphdef, lora, base = split(combined.on(tiny.decoder()))
    tx = optax.adam(1e-2)
    train_step = make_train_step(graphdef, tx)
    batch = {"tokens": TOKENS, "weights": jnp.ones(TOKENS.shape, jnp.float32)}
    state, losses = tx.init(lora), []
    before = jax.tree.map(jnp.copy, lora)
    for _ in range(3):
        lora, state, metrics = train_step(lora, base, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), lora, before)
    assert all(jax.tree.leaves(moved))
