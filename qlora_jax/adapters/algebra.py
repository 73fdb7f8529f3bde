"""Adapter algebra: scale, difference, interpolate, chain, compress, norms, similarity.

An adapter changes each linear by an update U = scale * lora_a @ lora_b. The functions
here compute with the updates as with vectors, but from the factors alone: no (in, out)
matrix is made. A sum puts factors side by side, [a1 a2] @ [b1; b2] = a1 @ b1 + a2 @ b2,
which is exact; `compress` brings the rank down again. All are pure, in float32.

Weighted sums of many adapters, and the methods that are no sums, are in combine.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.adapters.updates import (
    Path,
    Update,
    Updates,
    Weight,
    assemble,
    check_init,
    concrete,
    having,
    layer_names,
    read,
    union,
)
from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import ConfigError, gathered
from qlora_jax.names import EMBEDDING, dotted, in_words

dot = functools.partial(jnp.matmul, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure of each linear and layer, and of all together.

    Attributes:
      linears: {dotted name with the layer's number: float32 scalar}.
      total: float32 scalar.
    """

    linears: dict[str, Float[Array, ""]]
    total: Float[Array, ""]


def scale(adapter: Adapter, factor: Weight) -> Adapter:
    """Multiplies every update by a number, which may be negative or 0.

    Args:
      adapter: The adapter, which is left as it was.
      factor: A number; with 1 the adapter itself comes back.

    Returns:
      The same adapter with lora_b multiplied; its config stays.

    Raises:
      ConfigError: the factor is not finite, or not 1 for an adapter that holds a part of
        its base (LoRAConfig.init).
      AdapterMismatchError: something of it is no low-rank update; all is named.
    """
    check_weights([factor])
    if concrete(factor) and factor == 1:
        return adapter
    check_init([adapter], [factor])
    read([adapter])
    entries = [
        (path, v.replace(v.get_value() * factor) if path[-1] == "lora_b" else v)
        for path, v in nnx.to_flat_state(adapter.lora)
    ]
    return Adapter(nnx.from_flat_state(entries), adapter.config)


def difference(a: Adapter, b: Adapter) -> Adapter:
    """Returns a - b as an adapter, exactly; its ranks are the sums of theirs.

    What both hold of their base (LoRAConfig.init) cancels, so the result is a plain
    update, of init zero.

    Raises:
      ConfigError: only one of them holds a part of its base, or of another kind.
      AdapterMismatchError: bases or shapes differ, or something is no low-rank update.
    """
    if a.config.init != b.config.init:
        check_init([a, b], [1.0, -1.0])
    return assemble(concatenated(read([a, b]), [1.0, -1.0]), [a, b], init="zero")


def interpolate(a: Adapter, b: Adapter, t: Weight) -> Adapter:
    """Returns (1 - t) * a + t * b, exactly; its ranks are the sums of theirs.

    Args:
      a: The adapter at t = 0.
      b: The adapter at t = 1.
      t: Any number; outside 0 to 1 it extrapolates.

    Raises:
      ConfigError: t is not finite, or the adapters' inits differ.
      AdapterMismatchError: bases or shapes differ, or something is no low-rank update.
    """
    check_weights([t])
    check_init([a, b], [1.0, 0.0])  # 1 - t and t sum to 1 whatever t is
    return assemble(concatenated(read([a, b]), [1 - t, t]), [a, b])


def chain(first: Adapter, second: Adapter) -> Adapter:
    """Returns one adapter for two that were trained in turn.

    `second` was trained on the base with `first` merged into it. On the base itself the
    result does what the two do: their updates add up, exactly. Where the base was 4-bit
    and `merge(requantize=)` rounded it anew in between, the rounding is in no adapter:
    what merge loses there is the result's error.

    Args:
      first: An adapter of the base.
      second: An adapter of the base with `first` merged into it.

    Returns:
      An adapter of first's base; its ranks are the sums of theirs.

    Raises:
      ConfigError: second holds a part of its own base (LoRAConfig.init), which is not
        the result's base.
      AdapterMismatchError: bases or shapes differ, or something is no low-rank update.
    """
    if second.config.init != "zero":
        raise ConfigError(
            f"the second adapter has init {second.config.init}: it holds what quantization "
            "lost of its own base, the one with the first merged, and the result's base is "
            "another"
        )
    # Merging an adapter of the embedding changes the values that mark a base.
    paths = {dotted(path[:-1]) for path, _ in nnx.to_flat_state(first.lora)}
    parts = read([first, second], same_base=EMBEDDING not in paths)
    return assemble(concatenated(parts, [1.0, 1.0]), [first, second])


def compress(
    adapter: Adapter, rank: int | None = None, tolerance: float | None = None
) -> Adapter:
    """Returns the best approximation of an adapter by lower ranks.

    Each update's is the best in Frobenius norm (Eckart and Young, 1936): a QR of both
    factors leaves a rank x rank core, whose largest singular values are kept. Exactly one
    of rank and tolerance is given; with rank it can be traced by jit.

    Args:
      adapter: The adapter, which is left as it was. If it holds a part of its base, that
        part is approximated too.
      rank: The rank of every linear's update; a linear whose rank is lower keeps its own. A
        lower rank makes the adapter smaller and less exact.
      tolerance: The largest relative Frobenius error of a linear, 0 <= tolerance < 1. The
        ranks then differ by linear; a stack's layers share the largest that one needs.

    Returns:
      An adapter whose lora_a has orthonormal columns, with alpha equal to rank.

    Raises:
      ConfigError: not exactly one of rank and tolerance is given, or one is out of range
        (a rank above min(in, out), with every linear's name), or tolerance under jit.
      AdapterMismatchError: something of it is no low-rank update.
    """
    if (rank is None) == (tolerance is None):
        raise ConfigError("compress needs exactly one of rank= and tolerance=")
    (updates,) = read([adapter])
    if tolerance is not None:
        if not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is {tolerance}, expected 0 <= tolerance < 1")
        if not concrete(adapter.lora):
            raise ConfigError(
                "the ranks that a tolerance needs follow from values, which jax cannot see "
                "while it traces; call compress outside jit, or give rank="
            )
    check_rank(rank, updates)
    return assemble(truncated(updates, rank, tolerance), [adapter])


def update_norms(adapter: Adapter) -> Measured:
    """Returns the Frobenius norm of each update, a linear and layer.

    Layers without adapter are left out. `total` is the norm of all updates together. It
    is differentiable, with gradient 0 where a norm is 0.

    Raises:
      AdapterMismatchError: something of the adapter is no low-rank update.
    """
    (updates,) = read([adapter])
    norms = _by_name(updates, _norm)
    return Measured(norms, _root([x**2 for x in norms.values()]))


def cosine_similarity(a: Adapter, b: Adapter) -> Measured:
    """Returns the cosine between the updates of two adapters, a linear and layer.

    It is 0 where one of them has no update or a zero one. `total` is the cosine of all
    updates together, taken as one vector.

    Raises:
      AdapterMismatchError: bases or shapes differ, or something is no low-rank update.
    """
    first, second = read([a, b])
    norms = [update_norms(adapter) for adapter in (a, b)]
    both = {path: (first[path], second[path]) for path in first if path in second}
    inner: dict[str, Array] = {}
    for path, pair in both.items():
        values = _inner(*pair)
        for name, index in layer_names(path, pair[0]).items():
            inner[name] = values[index]
    linears = {}
    zero = jnp.zeros(())
    for name in dict.fromkeys([*norms[0].linears, *norms[1].linears]):
        lengths = [norm.linears.get(name, zero) for norm in norms]
        linears[name] = _ratio(inner.get(name, zero), lengths[0] * lengths[1])
    together = jnp.sum(jnp.stack([*inner.values(), zero]))
    return Measured(linears, _ratio(together, norms[0].total * norms[1].total))


def concatenated(
    parts: Sequence[Updates], weights: Sequence[Weight]
) -> dict[Path, tuple[Array, Array]]:
    """Returns factors of the exact weighted sum; all scaling is in lora_b."""
    factors = {}
    for path in union(parts):
        chosen = having(path, parts, weights)
        coefficients = jnp.stack(
            [jnp.asarray(w * u.scale, jnp.float32) for u, w in chosen]
        )
        pairs = [(u.lora_a, u.lora_b) for u, _ in chosen]
        factors[path] = _side_by_side(pairs, coefficients)
    return factors


def truncated(
    updates: Updates, rank: int | None, tolerance: float | None = None
) -> dict[Path, tuple[Array, Array]]:
    """Returns factors of the best approximations, as `compress` says."""
    factors = {}
    for path, update in updates.items():
        a, b = update.lora_a, update.lora_b
        if rank is not None:
            factors[path] = _truncated(a, b, update.scale, rank)
        else:
            assert tolerance is not None
            left, values, right = _decomposed(a, b, update.scale)
            needed = _needed(np.asarray(values), tolerance)
            factors[path] = kept(left, values, right, needed)
    return factors


def kept(
    left: Array, values: Array, right: Array, rank: int
) -> tuple[Float[Array, "*stack in rank"], Float[Array, "*stack rank out"]]:
    """Returns the factors that the largest singular values leave."""
    rank = min(rank, values.shape[-1])
    return left[..., :rank], values[..., :rank, None] * right[..., :rank, :]


def check_weights(weights: Sequence[Weight]) -> None:
    """Raises ConfigError unless all weights that can be seen are finite."""
    wrong = [w for w in weights if concrete(w) and not math.isfinite(float(w))]
    if wrong:
        said = ", ".join(map(str, map(float, wrong)))
        raise ConfigError(f"weights must be finite numbers, got {said}")


def check_rank(rank: int | None, updates: Updates) -> None:
    """Raises ConfigError of a rank that is below 1, or above what linears can have."""
    if rank is None:
        return
    if rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1")
    problems = [
        f"{in_words(path)}: {' x '.join(map(str, update.shape[-2:]))}"
        for path, update in updates.items()
        if rank > update.limit
    ]
    if problems:
        raise ConfigError(gathered(f"rank {rank} is above min(in, out)", problems))


def _by_name(updates: Updates, figure: Callable[..., Array]) -> dict[str, Array]:
    found = {}
    for path, update in updates.items():
        values = figure(update.lora_a, update.lora_b) * update.scale
        for name, index in layer_names(path, update).items():
            found[name] = values[index]
    return found


@jax.jit
def _side_by_side(
    pairs: list[tuple[Array, Array]], coefficients: Float[Array, " n"]
) -> tuple[Array, Array]:
    a = jnp.concatenate([a for a, _ in pairs], axis=-1)
    scaled = [b * c for (_, b), c in zip(pairs, coefficients, strict=True)]
    return a, jnp.concatenate(scaled, axis=-2)


@jax.jit
def _decomposed(
    a: Float[Array, "*stack in rank"],
    b: Float[Array, "*stack rank out"],
    scale: Weight,
) -> tuple[
    Float[Array, "*stack in kept"],
    Float[Array, "*stack kept"],
    Float[Array, "*stack kept out"],
]:
    """Returns the SVD of scale * a @ b, by QR of both and an SVD of the core."""
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    u, values, vh = jnp.linalg.svd(scale * dot(r_a, r_b.mT), full_matrices=False)
    return dot(q_a, u), values, dot(vh, q_b.mT)


@functools.partial(jax.jit, static_argnames="rank")
def _truncated(
    a: Float[Array, "*stack in rank"],
    b: Float[Array, "*stack rank out"],
    scale: Weight,
    rank: int,
) -> tuple[Array, Array]:
    left, values, right = _decomposed(a, b, scale)
    return kept(left, values, right, rank)


def _needed(values: np.ndarray, tolerance: float) -> int:
    """Returns the least rank that every layer's error allows, at least 1."""
    squares = values.astype(np.float64) ** 2
    # Of each rank from 0, the energy of what is dropped.
    tail = np.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    whole = tail[..., :1]
    return max(1, int(np.max(np.sum(tail > tolerance**2 * whole, axis=-1))))


@jax.custom_jvp
@jax.jit
def _norm(
    a: Float[Array, "*stack in rank"], b: Float[Array, "*stack rank out"]
) -> Float[Array, "*stack"]:
    """Returns the norm of a @ b.

    By QR: from grams alone, what cancels would leave the root of float32's precision.
    """
    core = dot(jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.mT, mode="r").mT)
    return jnp.sqrt(jnp.sum(core**2, axis=(-1, -2)))


@_norm.defjvp
def _norm_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # Of ||U||, <U, dU> / ||U||, by rank x rank grams. QR itself has no derivative where
    # factors are dependent, as those of a difference are.
    (a, b), (da, db) = primals, tangents
    norm = _norm(a, b)
    gram_a, gram_b = dot(a.mT, a), dot(b, b.mT)
    change = jnp.sum(dot(da.mT, a) * gram_b + gram_a * dot(db, b.mT), axis=(-1, -2))
    return norm, _ratio(change, norm)


def _inner(one: Update, other: Update) -> Float[Array, "*stack"]:
    """Returns the inner product of two updates, through a rank x rank gram of each side."""
    gram_a = dot(one.lora_a.mT, other.lora_a)
    gram_b = dot(one.lora_b, other.lora_b.mT)
    return one.scale * other.scale * jnp.sum(gram_a * gram_b, axis=(-1, -2))


def _ratio(x: Array, y: Array) -> Array:
    """Returns x / y, 0 where y is 0; so are its derivatives."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


def _root(squares: Sequence[Array]) -> Array:
    total = jnp.sum(jnp.stack(squares))
    return jnp.where(total == 0, 0.0, jnp.sqrt(jnp.where(total == 0, 1.0, total)))
