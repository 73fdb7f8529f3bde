"""The best low-rank copy of what a 4-bit weight lacks, and 4-bit weights to suit it.

    minimise |(W - Q - L) C^(1/2)|_F  over rank(L) = r,   C = mean of x x^T

has for a given 4-bit Q the solution L = V V^T E, E = W - Q, V the top r eigenvectors of
E C E^T. For a given L a better Q is W - L quantized; `alternate` does both in turn. One
weight is dealt with at a time.

Source: LoftQ (arXiv 2310.08659), Algorithm 1, which starts with L = 0; PiSSA (arXiv
2404.02948), whose quantized form starts with the principal part of W. QERA (arXiv
2410.06040) has C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn.packing import dequantize, requantize

_OVERSAMPLE = 16
_STEPS = 12
"""Subspace iterations: within 1 % of the best reduction (tests/adapters)."""

_dot = functools.partial(jnp.matmul, precision="highest")


class Rounds(NamedTuple):
    """Says how many rounds `alternate` goes, and from where.

    Attributes:
      iterations: Rounds of quantizing w less the adapter, then fitting the adapter. The
        first takes the base as it is, unless `principal`.
      principal: Start with the principal part of w for an adapter. The factors then are
        of one size, as PiSSA has them; else lora_a has that of a new one.
    """

    iterations: int = 1
    principal: bool = False

    @property
    def change_base(self) -> bool:
        """The 4-bit base becomes another if this is true."""
        return self.iterations > 1 or self.principal


class Fit(NamedTuple):
    """A 4-bit weight and its adapter, W ~ base + scale * (lora_a @ lora_b).T.

    Attributes:
      base: The 4-bit weight.
      lora_a: float32 (in, rank).
      lora_b: float32 (rank, out).
      energies: float32 (3,), the energy of the output, of what the given 4-bit weight alone
        lacks of it, and of what this one with its adapter lacks.
    """

    base: PackedWeight
    lora_a: Float[Array, "in rank"]
    lora_b: Float[Array, "rank out"]
    energies: Float[Array, "3"]


def alternate(
    w: Float[Array, "out in"],
    base: PackedWeight,
    moment: Array | None,
    key: Array,
    *,
    rank: int,
    scale: float,
    rounds: Rounds,
) -> Fit:
    """Fits an adapter, and with more rounds than one the 4-bit weight too.

    Args:
      w: The dense weight.
      base: The weight in 4 bits; it also says how to quantize again.
      moment: C, or its diagonal; None for the identity.
      key: The random key for the subspace iteration's start.
      rank: The rank of the adapter.
      scale: The factor of the adapter's update.
      rounds: The number of rounds, and what the first one starts from.

    Returns:
      The best of all rounds: one that makes matters worse is not taken.
    """
    fit = functools.partial(_factors, rank=rank, scale=scale, balanced=rounds.principal)
    q, before = base, None
    if rounds.principal:
        before = _lost(w, base, moment)
        a, b, _ = fit(w, None, moment, key)
        q = _rest(w, a, b, base, scale)
    a, b, energies = fit(w, q, moment, key)
    best = Fit(q, a, b, energies)
    for _ in range(rounds.iterations - 1):
        q = _rest(w, a, b, base, scale)
        a, b, energies = fit(w, q, moment, key)
        before = best.energies[1] if before is None else before
        if energies[2] < best.energies[2]:
            best = Fit(q, a, b, energies)
    if before is not None:
        best = best._replace(energies=best.energies.at[1].set(before))
    return best


def _rest(
    w: Array, a: Array, b: Array, like: PackedWeight, scale: float
) -> PackedWeight:
    """Quantizes what an adapter leaves of a weight."""
    rest = w.astype(jnp.float32) - scale * _dot(a, b).T
    return requantize(like, rest)


def _weigh(
    y: Float[Array, "in columns"], moment: Array | None
) -> Float[Array, "in columns"]:
    if moment is None:
        return y
    return moment[:, None] * y if moment.ndim == 1 else _dot(moment, y)


@jax.jit
def _lost(w: Array, q: PackedWeight, moment: Array | None) -> Float[Array, ""]:
    error = w.astype(jnp.float32) - dequantize(q, "float32")
    return jnp.sum(error.T * _weigh(error.T, moment))


@functools.partial(jax.jit, static_argnames=("rank", "scale", "balanced"))
def _factors(
    w: Float[Array, "out in"],
    q: PackedWeight | None,
    moment: Array | None,
    key: Array,
    *,
    rank: int,
    scale: float,
    balanced: bool,
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"], Float[Array, "3"]]:
    """Returns lora_a, lora_b, and the energies of the output and of both errors.

    Without q the factors are those of w itself.
    """
    w = w.astype(jnp.float32)
    error = w if q is None else w - dequantize(q, "float32")
    out, features = error.shape
    columns = min(rank + _OVERSAMPLE, out)
    start = jax.random.normal(key, (out, columns))

    def iterate(_, v):
        return jnp.linalg.qr(_dot(error, _weigh(_dot(error.T, v), moment)))[0]

    v = jax.lax.fori_loop(0, _STEPS, iterate, iterate(0, start))
    hidden = _dot(error.T, v)
    values, vectors = jnp.linalg.eigh(_dot(hidden.T, _weigh(hidden, moment)))
    keep = min(rank, columns)
    v = _dot(v, vectors[:, ::-1][:, :keep])
    a, b = _dot(error.T, v), v.T
    if balanced:  # scale^(1/2) * a and b each have the roots of the singular values
        norm, size = jnp.sqrt(scale * jnp.linalg.norm(a, axis=0, keepdims=True)), 1.0
    else:  # a new lora_a, uniform in +-1/sqrt(in), has this root mean square
        norm, size = jnp.sqrt(jnp.mean(a**2)), (3 * features) ** -0.5
    factor = jnp.where(norm > 0, size / jnp.where(norm > 0, norm, 1.0), 1.0)
    a, b = a * factor, b / (factor.T * scale)
    spare = ((0, 0), (0, rank - keep))  # a rank above out leaves columns at zero
    a, b = jnp.pad(a, spare), jnp.pad(b.T, spare).T
    before = jnp.sum(error.T * _weigh(error.T, moment))
    energies = (
        jnp.sum(w.T * _weigh(w.T, moment)),
        before,
        before - jnp.sum(values[-keep:]),
    )
    return a, b, jnp.stack(energies)
