"""Combining adapters: the exact weighted sum, and the merging methods that PEFT has.

Of adapters i with weight w and update s * A @ B (lora_a, lora_b and scale), a method makes

    concat     sum of w s A @ B, exactly; the rank is the sum of ranks
    svd        the best approximation of that sum by a rank, from the factors
    linear     A = sum of +-sqrt|w s| A, B = sum of sqrt|w s| B; the sign of w s goes to A
    M          as linear, with each A and B thinned out and, with TIES, signs elected
    M_svd      the same on the updates s A @ B themselves; then an SVD keeps a rank

where M is one of

    magnitude_prune    keeps the density * size entries of largest magnitude
    ties               so too; then of each entry the sign that wins, and the mean of w
                       times those that have it (arXiv 2306.01708)
    dare_linear        keeps each entry with probability density, over density
                       (arXiv 2311.03099)
    dare_ties          so too; then signs as ties

`linear` and the M work on factors, as if lora_a and lora_b were weights of their own: their
results are not sums of the updates, (A1 + A2) @ (B1 + B2) has cross terms. They are here
because other tools have them. M_svd forms (in, out), a layer at a time.

Source: peft 0.21.2, tuners/lora/model.py (add_weighted_adapter) and utils/merge_utils.py.
The random entries of dare follow from our key, so they are not PEFT's.
"""

import dataclasses
import difflib
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qlora_jax.adapters.algebra import (
    check_rank,
    compress,
    concatenated,
    dot,
    kept,
    scale,
    truncated,
)
from qlora_jax.adapters.updates import (
    Update,
    Updates,
    Weight,
    assemble,
    check_init,
    concrete,
    having,
    read,
    union,
)
from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import AdapterMismatchError, ConfigError, gathered
from qlora_jax.names import dotted, in_words

Method = Literal[
    "concat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]
"""What elects a sign: the entries' sum, or how many have it."""

METHODS: tuple[str, ...] = get_args(Method)
SUMS = ("concat", "svd")
"""Methods whose result is the weighted sum of the updates, or its approximation."""


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str = "concat",
    *,
    rank: int | None = None,
    density: float = 1.0,
    majority_sign: str = "total",
    key: Array | None = None,
) -> Adapter:
    """Makes one adapter of several, as the module says.

    A linear, or a layer, that only some have is combined of those. One adapter alone is
    scaled, whatever the method (PEFT does so too), and with weight 1 comes back as it is.
    All methods can be traced by jit, and weights may be traced scalars. concat and linear
    are differentiable; in a weight of 0, the slope of linear's square root is infinite.

    Args:
      adapters: Adapters of one base. Ranks, alphas, targets and layers may differ, but
        linear and the methods on factors need equal ranks of a linear.
      weights: One weight for each adapter; a negative one subtracts it.
      method: One of METHODS.
      rank: The rank of the result, for svd and M_svd; None takes the largest of all (or
        what a linear of a smaller shape, or a sum of smaller ranks, can have).
      density: The part of the entries that ties, dare and magnitude_prune keep, above 0.
      majority_sign: 'total' or 'frequency', for the methods with ties.
      key: The random key for dare's mask.

    Returns:
      An adapter with alpha equal to rank, and the rest of the config of the first; one
      adapter alone keeps its alpha.

    Raises:
      ConfigError: an argument is out of range, does not go with the method, or would
        break what adapters hold of their base (LoRAConfig.init); each is named.
      AdapterMismatchError: bases, shapes or (on factors) ranks differ, an adapter has NaN
        values or something that is no low-rank update; each is named.
    """
    _check(adapters, weights, method, rank, density, majority_sign, key)
    if len(adapters) == 1:
        alone = scale(adapters[0], weights[0])
        return alone if rank is None else compress(alone, rank)
    _check_inits(adapters, weights, method)
    parts = read(adapters)
    everything = {path: update for part in parts for path, update in part.items()}
    check_rank(rank, everything)
    most = rank or max(update.rank for part in parts for update in part.values())
    if method == "concat":
        return assemble(concatenated(parts, weights), adapters)
    if method == "svd":
        sums = concatenated(parts, weights)
        updates = {path: Update(a, b, 1.0) for path, (a, b) in sums.items()}
        return assemble(truncated(updates, most), adapters)
    full = method.endswith("_svd")
    if not full:
        _check_ranks(parts, method)
    mixing = _Mixing(method.removesuffix("_svd"), density, majority_sign)
    factors = {}
    for path in union(parts):
        updates, own = zip(*having(path, parts, weights), strict=True)
        draw = None
        if key is not None and method.startswith("dare"):
            draw = jax.random.fold_in(key, zlib.crc32(dotted(path).encode()))
        if full:
            factors[path] = _mixed_updates(updates, own, draw, mixing, most)
        else:
            factors[path] = _mixed_factors(updates, own, draw, mixing)
    return assemble(factors, adapters)


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    rank: int | None,
    density: float,
    majority_sign: str,
    key: Array | None,
) -> None:
    problems = []
    if not adapters:
        problems.append("there are no adapters; give at least one")
    if len(weights) != len(adapters):
        problems.append(
            f"there are {len(weights)} weights for {len(adapters)} adapters; give one each"
        )
    problems += [
        f"weight {number} is {float(w)}, expected a finite number"
        for number, w in enumerate(weights)
        if concrete(w) and not math.isfinite(float(w))
    ]
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"method {method!r} is none of {', '.join(METHODS)}{hint}")
    elif rank is not None and not method.endswith("svd"):
        problems.append(f"rank goes with svd and the methods on _svd, not {method}")
    if density != 1 and method in (*SUMS, "linear"):
        problems.append(
            f"density goes with ties, dare and magnitude_prune, not {method}"
        )
    if method.startswith("dare") and key is None:
        problems.append(
            f"{method} draws at random; give a key, such as jax.random.key(0)"
        )
    if rank is not None and rank < 1:
        problems.append(f"rank is {rank}, expected at least 1")
    if not 0 < density <= 1:
        problems.append(f"density is {density}, expected 0 < density <= 1")
    if majority_sign not in get_args(MajoritySign):
        problems.append(
            f"majority_sign is {majority_sign!r}, expected "
            f"{' or '.join(get_args(MajoritySign))}"
        )
    if problems:
        raise ConfigError(gathered("the adapters cannot be combined so", problems))


def _check_inits(
    adapters: Sequence[Adapter], weights: Sequence[Weight], method: str
) -> None:
    check_init(adapters, weights)
    if adapters[0].config.init != "zero" and method not in SUMS:
        raise ConfigError(
            f"adapters with init {adapters[0].config.init} hold the part of the base that "
            f"quantization lost, and {method} is no weighted sum that would keep it; use "
            f"{' or '.join(SUMS)}"
        )


def _check_ranks(parts: Sequence[Updates], method: str) -> None:
    problems = []
    for path in union(parts):
        ranks = {i: part[path].rank for i, part in enumerate(parts) if path in part}
        if len(set(ranks.values())) > 1:
            said = ", ".join(f"{rank} in adapter {i}" for i, rank in ranks.items())
            problems.append(f"{in_words(path)}: rank {said}")
    if problems:
        others = (
            "concat or svd" if method == "linear" else f"concat, svd or {method}_svd"
        )
        raise AdapterMismatchError(
            gathered(
                f"{method} works on the factors, which needs equal ranks of a linear, as "
                f"in PEFT; use {others}",
                problems,
            )
        )


@dataclasses.dataclass(frozen=True)
class _Mixing:
    """Says how matrices of one shape, one of each adapter, become one.

    Attributes:
      method: The name of one of PEFT's methods on factors.
      density: The part of the entries that stays.
      majority_sign: The way that a sign is elected, 'total' or 'frequency'.
    """

    method: str
    density: float
    majority_sign: str

    def __call__(
        self,
        tensors: Float[Array, "n rows columns"],
        weights: Float[Array, " n"],
        key: Array | None,
    ) -> Float[Array, "rows columns"]:
        if self.method.startswith("dare"):
            assert key is not None
            keep = jax.random.bernoulli(key, self.density, tensors.shape)
            tensors = jnp.where(keep, tensors / self.density, 0)
        elif self.method != "linear" and self.density < 1:
            kept = int(self.density * tensors[0].size)
            keep = jax.vmap(lambda x: _largest_magnitudes(x, kept))(tensors)
            tensors = jnp.where(keep, tensors, 0)
        weighted = tensors * weights[:, None, None]
        if not self.method.endswith("ties"):
            return jnp.sum(weighted, axis=0)
        agree = self._elected(tensors)
        count = jnp.maximum(jnp.sum(agree, axis=0), 1)
        return jnp.sum(jnp.where(agree, weighted, 0), axis=0) / count

    def _elected(
        self, tensors: Float[Array, "n rows columns"]
    ) -> Bool[Array, "n rows columns"]:
        """Whether an entry has the sign that wins among the adapters'; a tie is positive."""
        signs = jnp.sign(tensors)
        votes = jnp.sum(tensors if self.majority_sign == "total" else signs, axis=0)
        return signs == jnp.where(votes >= 0, 1.0, -1.0)


def _largest_magnitudes(
    x: Float[Array, "rows columns"], count: int
) -> Bool[Array, "rows columns"]:
    """Returns where the `count` entries of largest magnitude are; of equal ones the first.

    The least of them is found bit by bit, as floats above zero are ordered like their bits:
    31 passes, where XLA's top_k sorts (23 times as long at 4096 x 4096 on a CPU).
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).reshape(-1), jnp.int32)

    def narrow(i: Array, low: Array) -> Array:
        guess = low | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= guess) >= count, guess, low)

    least = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
    above, equal = bits > least, bits == least
    keep = above | (equal & (jnp.cumsum(equal) <= count - jnp.sum(above)))
    return keep.reshape(x.shape)


def _mixed_factors(
    updates: Sequence[Update],
    weights: Sequence[Weight],
    key: Array | None,
    mixing: _Mixing,
) -> tuple[Array, Array]:
    """Mixes lora_a and lora_b, each by itself; the rank stays."""
    pairs = zip(updates, weights, strict=True)
    signed = jnp.stack([jnp.asarray(w * u.scale, jnp.float32) for u, w in pairs])
    root = jnp.sqrt(jnp.abs(signed))
    a, b = (
        jnp.stack([u.lora_a for u in updates]),
        jnp.stack([u.lora_b for u in updates]),
    )
    keys_a, keys_b = (_layer_keys(key, side, updates[0]) for side in range(2))
    a = _each_layer(a, jnp.where(signed < 0, -root, root), keys_a, mixing)
    return a, _each_layer(b, root, keys_b, mixing)


@functools.partial(jax.jit, static_argnames="mixing")
def _each_layer(
    tensors: Float[Array, "n *stack rows columns"],
    weights: Float[Array, " n"],
    keys: Array | None,
    mixing: _Mixing,
) -> Float[Array, "*stack rows columns"]:
    n, *shape = tensors.shape
    flat = tensors.reshape(n, -1, *shape[-2:]).swapaxes(0, 1)
    return jax.vmap(lambda x, key: mixing(x, weights, key))(flat, keys).reshape(shape)


def _mixed_updates(
    updates: Sequence[Update],
    weights: Sequence[Weight],
    key: Array | None,
    mixing: _Mixing,
    rank: int,
) -> tuple[Array, Array]:
    """Mixes the updates themselves, a layer at a time, and keeps a rank of the result."""
    a, b = _each_update(
        [(_flat(u.lora_a), _flat(u.lora_b), u.scale) for u in updates],
        jnp.stack([jnp.asarray(w, jnp.float32) for w in weights]),
        _layer_keys(key, 0, updates[0]),
        mixing,
        rank,
    )
    stack = updates[0].shape[:-2]
    return a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:])


@functools.partial(jax.jit, static_argnames=("mixing", "rank"))
def _each_update(
    factors: list[tuple[Array, Array, Weight]],
    weights: Float[Array, " n"],
    keys: Array | None,
    mixing: _Mixing,
    rank: int,
) -> tuple[Float[Array, "layers in rank"], Float[Array, "layers rank out"]]:
    scales = [s for _, _, s in factors]

    def layer(xs: tuple) -> tuple[Array, Array]:
        pairs, key = xs
        whole = [s * dot(a, b) for (a, b), s in zip(pairs, scales, strict=True)]
        mixed = mixing(jnp.stack(whole), weights, key)
        left, values, right = jnp.linalg.svd(mixed, full_matrices=False)
        return kept(left, values, right, rank)

    return jax.lax.map(layer, ([(a, b) for a, b, _ in factors], keys))


def _flat(
    x: Float[Array, "*stack rows columns"],
) -> Float[Array, "layers rows columns"]:
    return x.reshape(-1, *x.shape[-2:])


def _layer_keys(key: Array | None, side: int, update: Update) -> Array | None:
    """Returns a key for each layer of a stack, one where there is none."""
    if key is None:
        return None
    layers = jnp.arange(math.prod(update.shape[:-2]))
    fold = functools.partial(jax.random.fold_in, jax.random.fold_in(key, side))
    return jax.vmap(fold)(layers)
