"""Adapter algebra: updates as vectors, without their matrices."""

import dataclasses
from typing import Any

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.adapters import LoRAConfig, attach, merge
from qlora_jax.adapters.algebra import (
    chain,
    compress,
    cosine_similarity,
    difference,
    interpolate,
    scale,
    update_norms,
)
from qlora_jax.adapters.combine import combine
from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import AdapterMismatchError, ConfigError

EXACT = 1e-6
"""Relative; what rounding to float32 leaves of an identity."""
LOGITS = 2e-5
"""Absolute; float32 sums in another order."""
TOKENS = tiny.tokens()
some = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-3, 3, width=32)


def doubled(adapter: Adapter, size: float = 1e-3, seed: int = 9) -> Adapter:
    """Returns an adapter of twice the rank, whose other half is small."""
    small = scale(drawn.adapter(seed), size)
    return combine([adapter, small], [1.0, 1.0])


@some
@given(seeds, numbers)
def test_scale_multiplies_every_update(seed: int, factor: float):
    adapter = drawn.adapter(seed)
    made = scale(adapter, factor)
    wanted = {k: factor * x for k, x in drawn.updates(adapter).items()}
    drawn.assert_near(drawn.updates(made), wanted, EXACT)
    assert made.config == adapter.config


def test_scale_by_one_is_the_adapter_itself_whatever_it_holds():
    adapter = drawn.adapter(init="loftq", dora=True)
    assert scale(adapter, 1.0) is adapter


def test_scale_by_zero_gives_the_bases_logits():
    adapter = Adapter.of(tiny.adapted(tiny.decoder(), targets="q_proj,o_proj"))
    base = tiny.logits(tiny.decoder(), TOKENS)
    assert np.abs(tiny.logits(adapter.on(tiny.decoder()), TOKENS) - base).max() > 0.01
    silent = scale(adapter, 0.0).on(tiny.decoder())
    np.testing.assert_allclose(tiny.logits(silent, TOKENS), base, atol=LOGITS)


def test_scale_can_be_traced_and_differentiated():
    adapter = drawn.adapter()
    norm = jax.jit(lambda t: update_norms(scale(adapter, t)).total)
    one = float(update_norms(adapter).total)
    assert float(norm(-2.5)) == pytest.approx(2.5 * one, rel=EXACT)
    assert float(jax.grad(norm)(0.7)) == pytest.approx(one, rel=1e-5)
    made = jax.jit(lambda a: scale(a, 0.5))(adapter)
    assert made.config == adapter.config
    assert jax.tree.structure(made) == jax.tree.structure(adapter)


@some
@given(seeds, st.sampled_from([1, 3, 5]))
def test_compress_is_the_best_that_a_rank_allows(seed: int, rank: int):
    shapes = {"layers.attn.q_proj": (3, 12, 10)}
    adapter = drawn.adapter(seed, shapes=shapes, rank=6, alpha=9.0, rslora=True)
    made = compress(adapter, rank=rank)
    assert made.config.shape_of("layers.attn.q_proj") == (rank, float(rank))
    left = drawn.updates(made)
    for name, update in drawn.updates(adapter).items():
        values = np.linalg.svd(update, compute_uv=False)
        best = np.sqrt(np.sum(values[rank:] ** 2))
        error = np.linalg.norm(update - left[name])
        assert abs(error - best) <= EXACT * np.linalg.norm(update)


def test_compress_keeps_what_has_the_rank_already():
    adapter = drawn.adapter(rank=3)
    wide = combine([adapter, drawn.adapter(1)], [1.0, 1.0])
    drawn.assert_near(
        drawn.updates(compress(wide, rank=6)), drawn.updates(wide), 2 * EXACT
    )
    twice = combine([adapter, adapter], [0.5, 0.5])
    back = compress(twice, rank=3)
    drawn.assert_near(drawn.updates(back), drawn.updates(adapter), 2 * EXACT)
    a = np.asarray(nnx.to_pure_dict(back.lora)["lm_head"]["lora_a"])
    np.testing.assert_allclose(a.T @ a, np.eye(3), atol=EXACT)


def test_compress_of_a_higher_rank_keeps_a_linears_own():
    adapter = drawn.adapter(rank=2, rank_pattern={"lm_head": 7})
    config = compress(adapter, rank=5).config
    assert config.shape_of("layers.attn.q_proj") == (2, 2.0)
    assert config.shape_of("lm_head") == (5, 5.0)


def test_compress_to_a_tolerance_takes_the_least_ranks_that_allow_it():
    large = drawn.adapter(rank=6)
    entries = [
        # One layer and the head need fewer; the stack takes what its other layers need.
        (path, v.replace(v[...].at[0, 2:].set(0) if v[...].ndim == 3 else v[...]))
        if path[-1] == "lora_b"
        else (path, v)
        for path, v in nnx.to_flat_state(large.lora)
    ]
    adapter = Adapter(nnx.from_flat_state(entries), large.config)
    ranks = {}
    for tolerance in (0.0, 0.2, 0.5):
        made = compress(adapter, tolerance=tolerance)
        left = drawn.updates(made)
        need: dict[str, int] = {}
        for name, update in drawn.updates(adapter).items():
            error = np.linalg.norm(update - left[name]) / np.linalg.norm(update)
            assert error <= tolerance + 2 * EXACT, name
            values = np.linalg.svd(update, compute_uv=False)
            tails = [np.sqrt(np.sum(values[r:] ** 2)) for r in range(7)]
            path = name.replace(".0", "").replace(".1", "").replace(".2", "")
            # Not at 0, where what float32 leaves decides.
            enough = tolerance * np.linalg.norm(update)
            least = next(r for r, tail in enumerate(tails) if tail <= enough + 1e-9)
            need[path] = max(need.get(path, 1), least)
        if tolerance:
            assert need == {p: made.config.shape_of(p)[0] for p in need}
        ranks[tolerance] = [made.config.shape_of(p)[0] for p in sorted(need)]
    assert ranks[0.0] == [6, 6] and max(ranks[0.5]) < 6


def test_a_tolerance_finds_the_rank_that_a_sum_hides():
    made = compress(doubled(drawn.adapter(), size=1e-5), tolerance=1e-3)
    assert made.config.rank == 3 and made.config.rank_pattern == {}


def test_compress_needs_one_of_rank_and_tolerance_in_range():
    adapter = drawn.adapter(rank=4)
    with pytest.raises(ConfigError, match="exactly one of rank= and tolerance="):
        compress(adapter)
    with pytest.raises(ConfigError, match="exactly one of rank= and tolerance="):
        compress(adapter, 2, 0.1)
    with pytest.raises(ConfigError, match="rank is 0, expected at least 1"):
        compress(adapter, 0)
    with pytest.raises(ConfigError, match="tolerance is 1.0, expected 0 <= "):
        compress(adapter, tolerance=1.0)
    with pytest.raises(ConfigError) as error:
        compress(adapter, 11)
    assert "rank 11 is above min(in, out) (2 problems)" in str(error.value)
    assert "layers.attn.q_proj: 12 x 10" in str(error.value)


def test_compress_can_be_traced_with_a_rank_and_says_so_of_a_tolerance():
    adapter = drawn.adapter(rank=4)
    made = jax.jit(lambda a: compress(a, rank=2))(adapter)
    drawn.assert_near(
        drawn.updates(made), drawn.updates(compress(adapter, rank=2)), EXACT
    )
    with pytest.raises(ConfigError, match="outside jit, or give rank="):
        jax.jit(lambda a: compress(a, tolerance=0.1))(adapter)


def test_chain_equals_training_on_the_merged_base():
    base = tiny.decoder()
    first = Adapter.of(tiny.moved(base, targets="q_proj,embed_tokens"))
    merged = merge(first.on(base), dtype="float32")
    second = Adapter.of(tiny.adapted(merged, targets="q_proj,o_proj", seed=6, rank=2))
    made = chain(first, second)
    assert made.config.shape_of("layers.attn.q_proj") == (6, 6.0)
    np.testing.assert_allclose(
        tiny.logits(made.on(base), TOKENS),
        tiny.logits(second.on(merged), TOKENS),
        atol=LOGITS,
    )
    assert made.config.targets == (
        *("embed_tokens", "layers.attn.o_proj", "layers.attn.q_proj"),
    )


@some
@given(seeds, seeds, st.booleans())
def test_chain_equals_concat_with_weights_of_one(one: int, other: int, rslora: bool):
    first, second = drawn.adapter(one), drawn.adapter(other, rank=2, rslora=rslora)
    wanted = combine([first, second], [1.0, 1.0])
    made = chain(first, second)
    assert made.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, made.lora, wanted.lora)


def test_chain_refuses_a_second_that_holds_a_part_of_its_base():
    first, second = drawn.adapter(init="loftq"), drawn.adapter(1, init="loftq")
    with pytest.raises(ConfigError, match="the second adapter has init loftq"):
        chain(first, second)
    assert chain(first, drawn.adapter(1)).config.init == "loftq"
    with pytest.raises(AdapterMismatchError, match="other parameter shapes"):
        chain(first, drawn.adapter(1, base="another"))


@some
@given(seeds, seeds)
def test_a_difference_added_back_is_the_adapter(one: int, other: int):
    a, b = drawn.adapter(one), drawn.adapter(other, rank=2, alpha=5.0, rslora=True)
    back = combine([difference(a, b), b], [1.0, 1.0])
    drawn.assert_near(drawn.updates(back), drawn.updates(a), 3 * EXACT)


def test_the_difference_of_an_adapter_and_itself_has_norm_zero():
    adapter = drawn.adapter(rank=5, shapes={"lm_head": (10, 12)})
    norms = update_norms(difference(adapter, adapter))
    size = float(update_norms(adapter).total)
    # From grams of the factors alone it would be about 3e-4 of this.
    assert float(norms.total) <= 2 * EXACT * size
    gradient = jax.grad(lambda t: update_norms(scale(adapter, t)).total)(0.0)
    assert float(gradient) == 0


def test_a_difference_of_adapters_that_hold_a_part_of_the_base_holds_none():
    a, b = drawn.adapter(init="qera"), drawn.adapter(1, init="qera")
    assert difference(a, b).config.init == "zero"
    with pytest.raises(ConfigError, match="init qera, zero"):
        difference(a, drawn.adapter(1))


def test_interpolate_has_the_adapters_at_its_ends():
    a, b = drawn.adapter(), drawn.adapter(1, rank=2, alpha=5.0)
    for t, wanted in ((0.0, a), (1.0, b)):
        made = interpolate(a, b, t)
        drawn.assert_near(drawn.updates(made), drawn.updates(wanted), EXACT)
    between = drawn.updates(interpolate(a, b, 0.25))
    drawn.assert_near(between, drawn.weighted([a, b], [0.75, 0.25]), EXACT)


def test_interpolate_is_differentiable_in_t_and_in_the_adapters():
    a, b = drawn.adapter(), drawn.adapter(1, rank=2)

    def size(t: Any, a: Adapter) -> jax.Array:
        return update_norms(interpolate(a, b, t)).total

    slope, grads = jax.jit(jax.grad(size, argnums=(0, 1)))(0.3, a)
    low, high = (drawn.weighted([a, b], [1 - t, t]) for t in (0.3 - 1e-5, 0.3 + 1e-5))
    norms = [np.sqrt(sum(np.sum(x**2) for x in u.values())) for u in (low, high)]
    assert float(slope) == pytest.approx((norms[1] - norms[0]) / 2e-5, rel=1e-4)
    # Of ||U|| by lora_b: scale * (1 - t) * a.T @ U / ||U||, here of the head.
    mid = drawn.weighted([a, b], [0.7, 0.3])
    norm = np.sqrt(sum(np.sum(x**2) for x in mid.values()))
    head = nnx.to_pure_dict(a.lora)["lm_head"]
    wanted = 0.7 * 4 / 3 * np.asarray(head["lora_a"]).T @ mid["lm_head"] / norm
    found = nnx.to_pure_dict(grads.lora)["lm_head"]["lora_b"]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_interpolation_keeps_what_adapters_hold_of_the_base():
    a, b = drawn.adapter(init="loftq"), drawn.adapter(1, init="loftq")
    assert interpolate(a, b, 1.7).config.init == "loftq"
    assert jax.jit(lambda t: interpolate(a, b, t))(0.2).config.init == "loftq"
    with pytest.raises(ConfigError, match="init loftq, zero"):
        interpolate(a, drawn.adapter(1), 0.5)
    with pytest.raises(ConfigError, match="finite numbers, got nan"):
        interpolate(a, b, float("nan"))


@some
@given(seeds, st.booleans())
def test_norms_are_those_of_the_matrices(seed: int, rslora: bool):
    adapter = drawn.adapter(seed, layers=(0, 2), rslora=rslora)
    norms, wanted = update_norms(adapter), drawn.updates(adapter)
    assert norms.linears.keys() == wanted.keys()
    assert "layers.1.attn.q_proj" not in norms.linears
    for name, x in wanted.items():
        assert float(norms.linears[name]) == pytest.approx(np.linalg.norm(x), rel=EXACT)
    total = np.sqrt(sum(np.sum(x**2) for x in wanted.values()))
    assert float(norms.total) == pytest.approx(total, rel=EXACT)


def test_figures_are_named_by_layer_and_expert():
    shapes = {
        "layers.mlp.experts.up_proj": (2, 2, 6, 5),
        "layers.attn.q_proj": (2, 6, 5),
    }
    adapter = drawn.adapter(shapes=shapes)
    wanted = {name: np.linalg.norm(x) for name, x in drawn.updates(adapter).items()}
    assert "layers.1.mlp.experts.0.up_proj" in wanted and len(wanted) == 6
    norms = update_norms(adapter).linears
    assert {k: float(x) for k, x in norms.items()} == pytest.approx(wanted, rel=EXACT)
    cosines = cosine_similarity(adapter, scale(adapter, -1.0)).linears
    assert cosines == pytest.approx(dict.fromkeys(wanted, -1.0), abs=2 * EXACT)


@some
@given(seeds)
def test_cosines_are_those_of_the_matrices(seed: int):
    a = drawn.adapter(seed)
    b = combine([a, drawn.adapter(seed ^ 1, rank=2)], [0.5, -1.0])
    cosines, (u, v) = cosine_similarity(a, b), (drawn.updates(a), drawn.updates(b))
    assert cosines.linears.keys() == u.keys()
    for name, x in u.items():
        wanted = np.sum(x * v[name]) / np.linalg.norm(x) / np.linalg.norm(v[name])
        assert float(cosines.linears[name]) == pytest.approx(wanted, abs=2 * EXACT)
    x, y = (np.concatenate([w[n].ravel() for n in u]) for w in (u, v))
    wanted = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert float(cosines.total) == pytest.approx(wanted, abs=2 * EXACT)


def test_cosines_of_itself_of_its_opposite_and_of_nothing():
    a = drawn.adapter(layers=(1,))
    other = drawn.adapter(1, shapes={"lm_head": (10, 12)})
    assert float(cosine_similarity(a, a).total) == pytest.approx(1, abs=2 * EXACT)
    opposite = cosine_similarity(a, scale(a, -2.0))
    assert float(opposite.total) == pytest.approx(-1, abs=2 * EXACT)
    partly = cosine_similarity(a, other).linears
    assert set(partly) == {"layers.1.attn.q_proj", "lm_head"}
    assert float(partly["layers.1.attn.q_proj"]) == 0 != float(partly["lm_head"])
    assert float(cosine_similarity(a, scale(a, 0.0)).total) == 0


def test_what_is_no_low_rank_update_is_refused_by_name():
    config = LoRAConfig(
        targets="q_proj",
        rank=4,
        dora=True,
        bias="all",
        modules_to_save=("norm",),
        tokens=(3,),
    )
    model = attach(tiny.decoder(bias=True), config, key=jax.random.key(0))
    adapter = Adapter.of(model)
    for compute in (
        lambda: scale(adapter, 2.0),
        lambda: compress(adapter, rank=1),
        lambda: update_norms(adapter),
    ):
        with pytest.raises(AdapterMismatchError) as error:
            compute()
        text = str(error.value)
        assert "layers.attn.q_proj.magnitude is no low-rank update (DoRA's" in text
        assert "layers.attn.k_proj.bias is no low-rank update (a bias that" in text
        assert "layers.attn.q_proj.bias is" in text
        assert "norm.weight is no low-rank update (a module that trained)" in text
        assert "embed_tokens.rows is no low-rank update (rows of tokens)" in text


def test_broken_factors_are_all_named():
    good = drawn.adapter()
    flat = dict(nnx.to_flat_state(good.lora))
    head = flat["lm_head", "lora_a"]
    flat["lm_head", "lora_a"] = head.replace(head[...].at[0, 0].set(jnp.nan))
    config = dataclasses.replace(good.config, rank_pattern={"q_proj": 5})
    broken = Adapter(nnx.from_flat_state(flat.items()), config)
    with pytest.raises(AdapterMismatchError) as error:
        difference(good, broken)
    text = str(error.value)
    assert "adapter 1: lm_head.lora_a has NaN or Inf values" in text
    assert (
        "layers.attn.q_proj: the factors have ranks 3 and 3, the config says 5" in text
    )
    del flat["lm_head", "lora_a"]
    with pytest.raises(AdapterMismatchError, match="lm_head has not both of lora_a"):
        scale(Adapter(nnx.from_flat_state(flat.items()), good.config), 2.0)


def test_other_bases_and_other_shapes_are_all_named():
    a = drawn.adapter()
    shapes = drawn.LINEARS | {"lm_head": (10, 14)}
    with pytest.raises(AdapterMismatchError) as error:
        cosine_similarity(a, drawn.adapter(shapes=shapes, base="another"))
    text = str(error.value)
    assert "adapter 1 against adapter 0: its base had other parameter shapes" in text
    assert "lm_head: updates of other shapes, (10, 12) in adapter 0, (10, 14)" in text


def test_an_adapter_that_holds_a_part_of_its_base_is_not_scaled():
    adapter = drawn.adapter(init="loftq")
    with pytest.raises(ConfigError, match="would hold it 2 times"):
        scale(adapter, 2.0)
    with pytest.raises(ConfigError, match="cannot be seen while jax traces"):
        jax.jit(lambda t: scale(adapter, t))(1.0)
    assert compress(adapter, rank=2).config.init == "loftq"
