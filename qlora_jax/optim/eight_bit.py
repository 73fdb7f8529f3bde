"""AdamW whose moments rest in 8 bits: two bytes and a bit a parameter instead of eight.

A moment is cut into blocks of 256 elements; each is divided by its largest magnitude
(absmax, float32) and every element takes the nearest value of a map with 256 values, spaced
in decades: signed for the first moment, unsigned for the second. An update dequantizes both,
is Adam's in float32, is applied as it is, and only then are the new moments quantized.

    optax.adamw:  m, v                      float32, 8 bytes a parameter
    adamw_8bit:   m, v: codes and absmax    uint8 and float32 / 256, 2.03 bytes

Blocks run row-major through the last two axes and start anew at each matrix of a stack
(layers, in, rank): each is the tensor of its own that it is in PyTorch. A stack is updated
layer by layer, so that float32 moments exist of one at a time. Small matrices, where there
is nothing to save, keep them.

What it is not: as exact as float32. A second moment below 1.6e-7 of its block's largest
(gradients below 4e-4 of the block's largest) rounds to 0, and the next gradient alone then
scales its element's step. bitsandbytes' CUDA kernel moves a negative first moment that
rounds to 0 to the next code, to keep its sign; its other backends don't, nor is it done here.

Source: Dettmers et al., arXiv 2110.02861, section 2; bitsandbytes 0.50.2, optim/optimizer.py
(block size, least size), backends/cpu/ops.py (order of the update), backends/default/ops.py
(nearest value, ties to the lower).
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.absmax4.codebook import dynamic_map
from qlora_jax.errors import ConfigError

_BUCKET_BITS = 16
"""So many leading bits of a float32 are enough to find its nearest value: the sign, the
exponent, and 7 bits of the mantissa."""


class BlockwiseMoment(NamedTuple):
    """A moment in 8 bits.

    Attributes:
      codes: Indices into the map, uint8, of the parameter's shape (*stack, in, out).
      absmax: Largest magnitude of each block, float32 (*stack, ceil(in * out / block_size)).
    """

    codes: UInt8[Array, "*shape"]
    absmax: Float[Array, "*stack blocks"]


Moment = Array | BlockwiseMoment


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    block_size: int = 256,
    smallest: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.adamw` with its moments in 8 bits.

    Where the state's tree has a moment's array, this one's has a BlockwiseMoment; all else
    (the chain, the count, decay, schedule) is optax.adamw's.

    Args:
      learning_rate: A number, or a schedule of the step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment after bias correction.
      weight_decay: Decoupled, times the learning rate.
      mask: The parameters that decay: a tree of bools or a function of the parameters to
        one.
      block_size: Elements that share one absmax.
      smallest: Matrices (the last two axes) of fewer elements keep float32 moments.

    Returns:
      An optax transform for parameters of any float dtype; updates of float32 ones are
      float32 of the parameters' shape.

    Raises:
      ConfigError: block_size below 1, or smallest below 0.

    Source: optax.adamw; bitsandbytes AdamW8bit, of which the defaults of `block_size` and
      `smallest` (min_8bit_size) are.
    """
    if block_size < 1 or smallest < 0:
        raise ConfigError(
            f"block_size is {block_size} and smallest {smallest}, expected at least 1 and 0"
        )
    return optax.chain(
        _scale_by_adam(b1, b2, eps, block_size, smallest),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(
    b1: float, b2: float, eps: float, block_size: int, smallest: int
) -> optax.GradientTransformation:
    """Wraps optax.scale_by_adam, so that its arithmetic is the only one."""
    inner = optax.scale_by_adam(b1, b2, eps)

    def empty(param: Array) -> Moment:
        size = math.prod(param.shape[-2:])
        if size < smallest:
            return jnp.zeros(param.shape, jnp.float32)
        blocks = (*param.shape[:-2], -(-size // block_size))
        return BlockwiseMoment(
            jnp.zeros(param.shape, jnp.uint8), jnp.zeros(blocks, jnp.float32)
        )

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        mu, nu = jax.tree.map(empty, params), jax.tree.map(empty, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def plain(count: Array, grad: Array, mu: Any, nu: Any) -> tuple:
        stepped = inner.update(grad, optax.ScaleByAdamState(count, mu, nu))
        update, state = cast(tuple[Array, optax.ScaleByAdamState], stepped)
        return update, state.mu, state.nu

    def one(
        count: Array, grad: Array, mu: BlockwiseMoment, nu: BlockwiseMoment
    ) -> tuple:
        first = dequantize_moment(mu, True, block_size)
        second = dequantize_moment(nu, False, block_size)
        update, first, second = plain(count, grad, first, second)
        mu = quantize_moment(first, True, block_size)
        return update, mu, quantize_moment(second, False, block_size)

    def step(count: Array, grad: Array, mu: Moment, nu: Moment) -> tuple:
        if not (isinstance(mu, BlockwiseMoment) and isinstance(nu, BlockwiseMoment)):
            return plain(count, grad, mu, nu)
        carry = grad.astype(jnp.float32), mu, nu
        if grad.ndim < 3:
            return one(count, *carry)

        def layer(i: Array, carry: tuple) -> tuple:
            here = jax.tree.map(lambda x: x[i], carry)
            return jax.tree.map(lambda x, y: x.at[i].set(y), carry, one(count, *here))

        # In place, so that the float32 moments are never there of more than a layer.
        return lax.fori_loop(0, grad.shape[0], layer, carry)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        grads, tree = jax.tree.flatten(updates)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        stepped = [step(state.count, *x) for x in zip(grads, *moments, strict=True)]
        updates, mu, nu = (tree.unflatten(x[i] for x in stepped) for i in range(3))
        count = optax.safe_increment(state.count)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def quantize_moment(
    x: Float[Array, "*shape"], signed: bool, block_size: int
) -> BlockwiseMoment:
    """Quantizes a moment, the nearest value of the map for each element.

    Args:
      x: float32, (*stack, in, out) or of fewer axes; blocks run through the last two.
      signed: Whether the map has negative values; if not, x must not be negative.
      block_size: Elements that share one absmax; the last block of a matrix may be partial.

    Returns:
      Codes of x's shape and the blocks' absmax. NaN or Inf make their whole block NaN.
    """
    stack, size = x.shape[:-2], math.prod(x.shape[-2:])
    flat = x.reshape(*stack, size)
    flat = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, -size % block_size)])
    blocks = flat.reshape(*stack, -1, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # The reciprocal of anything smaller is not finite, or is flushed to zero before.
    least = jnp.finfo(jnp.float32).tiny
    scaled = blocks * (1.0 / jnp.maximum(absmax, least))[..., None]
    codes = _nearest(scaled, signed).reshape(*stack, -1)[..., :size]
    return BlockwiseMoment(codes.reshape(x.shape), absmax)


def dequantize_moment(
    moment: BlockwiseMoment, signed: bool, block_size: int
) -> Float[Array, "*shape"]:
    """Returns the float32 values of what `quantize_moment` made."""
    codes, absmax = moment
    stack, size = codes.shape[:-2], math.prod(codes.shape[-2:])
    values = _take(dynamic_map(signed), codes.reshape(*stack, size))
    scales = jnp.repeat(absmax, block_size, axis=-1)[..., :size]
    return (values * scales).reshape(codes.shape)


def _nearest(x: Float[Array, "*shape"], signed: bool) -> UInt8[Array, "*shape"]:
    """Finds codes in two look-ups; a binary search of midpoints takes 30 times as long."""
    lowest, midpoints = _search_tables(signed)
    bits = lax.bitcast_convert_type(x, jnp.uint32) >> (32 - _BUCKET_BITS)
    codes = _take(lowest, bits)
    return codes + (x > _take(midpoints, codes)).astype(jnp.uint8)


def _take(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


@functools.cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns what finds the value of a map nearest to an x in [-1, 1].

    Returns:
      For each pattern of x's first 16 bits, the code of the lowest x that begins with it
      (no two midpoints begin alike, so that the code of x is this or the next), and above
      each code, the midpoint to the next; x on it has the lower code.
    """
    table = dynamic_map(signed)
    midpoints = (table[1:] + table[:-1]) / np.float32(2)
    low = np.arange(2**_BUCKET_BITS, dtype=np.uint32) << (32 - _BUCKET_BITS)
    high = low | np.uint32(2 ** (32 - _BUCKET_BITS) - 1)
    lowest = np.where(low >> 31, high, low).view(np.float32)  # of negatives the last
    codes = np.searchsorted(midpoints, lowest, side="left").astype(np.uint8)
    return codes, np.append(midpoints, np.float32(np.inf))
