"""The gated delta rule in chunks, and the short convolution before it.

A head has a state of (key features, value features). At each token the state decays, what it
holds under the token's key moves towards the token's value by a share, and the token's query
reads it:

    S = exp(log_decay) S;    S = S + key (rate (value - S^T key))^T;    y = S^T query

(Gated Delta Networks, arXiv 2412.06464). Within a chunk of tokens that is the inverse of a
triangular matrix and products, as that paper derives; between chunks the state goes on. It is
computed in float32. A token at position 0 begins a document: nothing before it reaches it. A
position of -1 is padding, which leaves the state as it is.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.variables import FrozenParam

CHUNK = 64
"""Tokens of a chunk, as in transformers and in flash-linear-attention."""

TOGETHER = 16
"""Chunks that are worked on at once. Backward keeps a state for each group of so many, and
makes the rest of one group at a time again."""

_EPSILON = 1e-6
"""Added to a squared length, as in transformers' l2norm (models/qwen3_next)."""


class Convolution(Weighted):
    """A causal convolution of each feature with itself.

    Attributes:
      weight: FrozenParam, (..., features, 1, taps), the last tap for the token itself.
      bias: FrozenParam, (..., features), or None.
    """

    NDIM = 3
    AXES: ClassVar = {"weight": ("out", "in", "taps"), "bias": ("out",)}

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = FrozenParam(weight)
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))

    def holding(self, weight: Any, bias: Any = None) -> "Convolution":
        """Returns the convolution of another weight and bias."""
        return Convolution(weight, bias)

    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        positions: Int[Array, "batch seq"],
        before: Float[Array, "batch past features"] | None = None,
    ) -> tuple[Float[Array, "batch seq features"], Float[Array, "batch past features"]]:
        """Returns the convolution, float32, and the inputs that the next token needs.

        Args:
          x: What is convolved.
          positions: A token's position; no tap reaches over position 0.
          before: The inputs of the tokens before, one fewer than taps; None for none.
        """
        weight = self.weight[...].astype(jnp.float32)[:, 0]
        taps, seq = weight.shape[1], x.shape[1]
        if before is None:
            before = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)
        along = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        y = jnp.zeros(x.shape, jnp.float32)
        for back in range(taps):
            first = taps - 1 - back
            part = along[:, first : first + seq].astype(jnp.float32)
            inside = (positions >= back)[..., None]
            y += jnp.where(inside, part, 0) * weight[:, first]
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y, along[:, seq:]


class Decay(Weighted):
    """The logarithm of a state's decay: -exp(weight) * softplus(x + bias).

    Attributes:
      weight: FrozenParam, (..., heads); A_log in the files.
      bias: FrozenParam, (..., heads); dt_bias in the files.
    """

    NDIM = 1
    AXES: ClassVar = {"weight": ("heads",), "bias": ("heads",)}

    def __init__(self, weight: Array, bias: Array):
        self.weight = FrozenParam(weight)
        self.bias = FrozenParam(bias)

    def holding(self, weight: Any, bias: Any = None) -> "Decay":
        """Returns the decay of another weight and bias."""
        return Decay(weight, bias)

    def __call__(self, x: Float[Array, "*batch heads"]) -> Float[Array, "*batch heads"]:
        """Returns values of 0 at most, float32."""
        rate = jnp.exp(self.weight[...].astype(jnp.float32))
        return -rate * self.step(x)

    def step(self, x: Float[Array, "*batch heads"]) -> Float[Array, "*batch heads"]:
        """Returns softplus(x + bias), float32."""
        bias = self.bias[...].astype(jnp.float32)
        return jax.nn.softplus(x.astype(jnp.float32) + bias)


class Chunks(NamedTuple):
    """Tokens of some chunks; axes are (chunks, batch, key heads, ..., tokens, features)."""

    q: Array
    k: Array
    v: Array  # with an axis of value heads a key head behind the key heads
    decay: Array  # as v, without features
    rate: Array  # as decay
    begun: (
        Array  # (chunks, batch, tokens): documents begun in the chunk up to each token
    )


def gated_delta_rule(
    q: Float[Array, "batch seq key_heads keys"],
    k: Float[Array, "batch seq key_heads keys"],
    v: Float[Array, "batch seq value_heads values"],
    log_decay: Float[Array, "batch seq value_heads"],
    rate: Float[Array, "batch seq value_heads"],
    positions: Int[Array, "batch seq"],
    state: Float[Array, "batch value_heads keys values"] | None = None,
) -> tuple[
    Float[Array, "batch seq value_heads values"],
    Float[Array, "batch value_heads keys values"],
]:
    """Applies the rule to all tokens; memory is linear in their number.

    Args:
      q, k: Queries and keys, which are scaled to length 1 here, and queries by
        keys**-0.5 beside. A key head serves value_heads / key_heads value heads in a row.
      v: Values.
      log_decay: At most 0.
      rate: From 0 to 1.
      positions: 0 where a document begins, -1 for padding.
      state: What the tokens before have left, float32; None for none.

    Returns:
      Outputs in the dtype of the values, and the state after the last token.
    """
    return in_chunks(_some, q, k, v, log_decay, rate, positions, state)


def in_chunks(
    some: Callable[[Array, Chunks], tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    rate: Array,
    positions: Array,
    state: Array | None,
) -> tuple[Array, Array]:
    """Goes over all tokens, one group of chunks after another.

    Args:
      some: (state, one group) -> (the state after it, its outputs with the axes of v).
      q, k, v, log_decay, rate, positions, state: See `gated_delta_rule`.

    Returns:
      What `gated_delta_rule` does.
    """
    batch, seq, key_heads, keys = k.shape
    heads, values = v.shape[2:]
    each = heads // key_heads
    first, real = positions == 0, positions >= 0
    rate = jnp.where(real[..., None], rate, 0)
    # The first token's own decay would be of a state that it does not see.
    log_decay = jnp.where((real & ~first)[..., None], log_decay, 0)
    size = min(CHUNK, 1 << (seq - 1).bit_length())
    chunks = -(-seq // size)
    groups = -(-chunks // TOGETHER)
    together = -(-chunks // groups)

    def cut(x: Array) -> Array:
        more = groups * together * size - seq
        x = jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(batch, groups, together, size, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)  # (groups, together, batch, size, ...)

    def by_head(x: Array, *heads: int) -> Array:
        x = cut(x)
        x = x.reshape(*x.shape[:4], *heads, *x.shape[5:])
        return jnp.moveaxis(x, 3, 3 + len(heads))

    xs = Chunks(
        by_head(q, key_heads),
        by_head(k, key_heads),
        by_head(v, key_heads, each),
        by_head(log_decay, key_heads, each),
        by_head(rate, key_heads, each),
        jnp.cumsum(cut(first.astype(jnp.int32)), axis=-1),
    )
    if state is None:
        state = jnp.zeros((batch, heads, keys, values), jnp.float32)
    state = state.reshape(batch, key_heads, each, keys, values)
    state, y = lax.scan(jax.checkpoint(some, prevent_cse=False), state, xs)
    y = jnp.moveaxis(
        y, -2, 3
    )  # (groups, together, batch, size, key heads, each, values)
    y = jnp.moveaxis(y, 2, 0).reshape(batch, -1, heads, values)[:, :seq]
    return y, state.reshape(batch, heads, keys, values)


class Decays(NamedTuple):
    """Says how much of what one token does another sees, as factors.

    Attributes:
      between: Of what each token of a chunk writes, for each that reads, (..., reads, writes).
      since: Of the state before the chunk, for each token, (..., tokens, 1).
      until: Of what each token writes, in the state after the chunk, (..., tokens, 1).
      through: Of the state before the chunk in the one after it, (...).
    """

    between: Array
    since: Array
    until: Array
    through: Array

    @classmethod
    def of(cls, some: Chunks) -> "Decays":
        """Returns those of each chunk of a group."""
        size = some.decay.shape[-1]
        begun = some.begun[:, :, None, None]  # for each pair of heads
        # Tokens that see the state before the chunk, and those that the one behind sees.
        whole = (begun == 0).astype(jnp.float32)
        ends = begun == begun[..., -1:]
        seen = (begun[..., :, None] == begun[..., None, :]) & jnp.tri(size, dtype=bool)
        # Since the chunk's beginning, or the document's: in no sum are another's numbers, which
        # would reach this one's by their rounding.
        decay = jnp.sum(jnp.where(seen, some.decay[..., None, :], 0), axis=-1)
        # Masked before exp, which could overflow.
        between = decay[..., :, None] - decay[..., None, :]
        return cls(
            jnp.exp(jnp.where(seen, between, -jnp.inf)),
            (jnp.exp(decay) * whole)[..., None],
            jnp.exp(jnp.where(ends, decay[..., -1:] - decay, -jnp.inf))[..., None],
            jnp.exp(decay[..., -1]) * whole[..., -1],
        )


def _some(state: Array, some: Chunks) -> tuple[Array, Array]:
    """Goes over one group of chunks; returns the state after it and its outputs."""
    q, k, v = (x.astype(jnp.float32) for x in some[:3])
    k = k * lax.rsqrt(jnp.sum(k * k, -1, keepdims=True) + _EPSILON)
    q = q * lax.rsqrt(jnp.sum(q * q, -1, keepdims=True) + _EPSILON)
    q = q * q.shape[-1] ** -0.5
    between, since, until, through = Decays.of(some)
    k, q = k[:, :, :, None], q[:, :, :, None]  # an axis for the value heads of each
    kt = k.swapaxes(-1, -2)
    rate = some.rate[..., None]
    # What each token writes depends on what those before it wrote: unit lower triangular.
    system = rate * (k @ kt) * between
    right = jnp.concatenate([rate * v, rate * since * k], axis=-1)
    solved = unit_lower_inverse(system) @ right
    written, old = jnp.split(solved, [v.shape[-1]], axis=-1)
    parts = written, old, q * since, (q @ kt) * between, k * until, through

    def chunk(state: Array, parts: Any) -> tuple[Array, Array]:
        written, old, reads, within, writes, through = parts
        new = written - old @ state
        y = reads @ state + within @ new
        state = state * through[..., None, None] + writes.swapaxes(-1, -2) @ new
        return state, y.astype(some.v.dtype)

    return lax.scan(chunk, state, parts)


_matmul = functools.partial(jnp.matmul, precision="highest")


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Returns the inverse of the unit lower triangular matrix that lies below a's diagonal.

    Inverses of neighbouring blocks on the diagonal are joined to one of twice the size, log2(n)
    times: products alone, and as accurate as substitution. On CPUs jaxlib's own triangular
    solve is none to build on: over a batch it waits in a thread of the pool for other threads
    of the same pool, and two such waits on two processors never end (jaxlib 0.10.2).

    Args:
      a: n is a power of two; the diagonal and what is above it are not read.
    """
    size = a.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    block = 1
    while block < size:
        pair = row // (2 * block) == column // (2 * block)
        below = jnp.where(pair & (row // block > column // block), a, 0)
        if block > 1:
            below = _matmul(_matmul(inverse, below), inverse)
        inverse, block = inverse - below, 2 * block
    return inverse


def _inverse_forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse: Array, grad: Array) -> tuple[Array]:
    turned = inverse.swapaxes(-1, -2)
    return (-jnp.tril(_matmul(_matmul(turned, grad), turned), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
