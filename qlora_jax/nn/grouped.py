"""Products of tokens that are grouped by expert: one pass over the experts for each linear.

Tokens are sorted by expert and laid out in blocks that belong to one expert each, so that
nothing is dropped (as MegaBlocks does, arXiv 2211.15841). How many blocks there can be is known
from shapes alone; those that stay empty are not multiplied. A product goes through the experts
that have tokens, makes each one's weight ready once, and multiplies its blocks by it.

Feed-forwards are written for one expert and vectorized over blocks. `GroupedLinear` takes the
place of their linears there: its weight keeps the axis of experts, and what would be a product
for each block is the grouped one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import current_device
from pallas_kernels.formats import PackedWeight
from pallas_kernels.matmul import REFERENCE, product_of
from qlora_jax.nn.frozen import replaced
from qlora_jax.nn.linear import FrozenLinear, low_rank
from qlora_jax.nn.matmul import frozen_matmul
from qlora_jax.nn.variables import FrozenParam

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 256


class Groups(NamedTuple):
    """Says where tokens lie when they are grouped by expert.

    Attributes:
      owner: Int32 (blocks,), the expert of each block.
      ends: Int32 (count,), the number of blocks of the experts up to and with each.
      pair: Int32 (blocks * block,), which of the tokens * k pairs of token and expert a row
        has; tokens * k where it has none.
      slot: Int32 (tokens, k), the row that each pair has.
    """

    owner: Int[Array, " blocks"]
    ends: Int[Array, " count"]
    pair: Int[Array, " rows"]
    slot: Int[Array, "tokens k"]


def group(chosen: Int[Array, "tokens k"], count: int) -> Groups:
    """Groups tokens by expert.

    Args:
      chosen: The experts of each token, below count.
      count: The number of experts.
    """
    pairs = chosen.size
    block = _block_size(pairs, count)
    blocks = (pairs + count * (block - 1)) // block
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=count)
    filled = -(-sizes // block)
    ends = jnp.cumsum(filled)
    # Where a pair lies: its expert's first block, and its rank among that expert's pairs.
    starts = (ends - filled) * block
    rank = jnp.arange(pairs) - (jnp.cumsum(sizes) - sizes)[expert[order]]
    slot = jnp.zeros(pairs, jnp.int32).at[order].set(starts[expert[order]] + rank)
    pair = jnp.full(blocks * block, pairs, jnp.int32)
    pair = pair.at[slot].set(jnp.arange(pairs, dtype=jnp.int32))
    owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return Groups(
        jnp.minimum(owner, count - 1).astype(jnp.int32),
        ends.astype(jnp.int32),
        pair,
        slot.reshape(chosen.shape),
    )


def dispatch(
    x: Float[Array, "tokens hidden"], groups: Groups
) -> Float[Array, "blocks block hidden"]:
    """Lays tokens out in blocks; rows without a token are zero."""
    token = groups.pair // groups.slot.shape[1]
    rows = _rows(x, token, groups.slot)
    return rows.reshape(len(groups.owner), -1, x.shape[-1])


def combine(
    y: Float[Array, "blocks block hidden"],
    weights: Float[Array, "tokens k"],
    groups: Groups,
) -> Float[Array, "tokens hidden"]:
    """Returns the sum of weight * output over a token's experts, in y's dtype."""
    rows = y.reshape(-1, y.shape[-1])
    each = _rows(rows, groups.slot.reshape(-1), groups.pair[:, None])
    each = each.reshape(*groups.slot.shape, -1).astype(jnp.float32)
    return jnp.sum(each * weights[..., None], axis=1).astype(y.dtype)


@jax.custom_vjp
def _rows(
    x: Float[Array, "m hidden"], there: Int[Array, " n"], back: Int[Array, "m times"]
) -> Float[Array, "n hidden"]:
    """Returns x[there], zero where an index is past x. Backward gathers too, from `back`,
    which says where each row of x went: a gather is much faster than the sum of a scatter."""
    del back
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


def _rows_fwd(x, there, back):
    return _rows(x, there, back), back


def _rows_bwd(back, dy):
    each = jnp.take(dy, back, axis=0, mode="fill", fill_value=0)
    return jnp.sum(each.astype(jnp.float32), axis=1).astype(dy.dtype), None, None


_rows.defvjp(_rows_fwd, _rows_bwd)


class GroupedLinear(FrozenLinear):
    """Stands for a frozen linear of all experts in a function that is vectorized over blocks.

    Attributes:
      kernel: FrozenParam, (experts, out, in), dense or packed.
      bias: FrozenParam, (out,), that of the block's expert, or None.
      origin: See `FrozenLinear`.
    """

    def __init__(self, linear: FrozenLinear, groups: Groups, index: Array):
        """Takes the place of a linear whose kernel has the axis of experts.

        Args:
          linear: The linear; its bias is that of one expert.
          groups: The groups.
          index: The block's number, which the function is vectorized over.
        """
        self.kernel: nnx.Variable = linear.kernel
        self.bias = nnx.data(linear.bias)
        self.origin = linear.origin
        self.implementation = getattr(linear, "implementation", None)
        self.groups, self.index = nnx.data(groups), nnx.data(index)

    def product(
        self,
        x: Float[Array, "*batch in"],
        adapter: tuple[Array, Array, float] | None = None,
    ) -> Float[Array, "*batch out"]:
        """Computes x @ kernel.T of the block's expert in x's dtype, and adds an adapter's
        part."""
        flat = x.reshape(-1, x.shape[-1])
        product = _of_a_block(self.implementation)
        y = product(flat, self.index, self.stored, self.groups)
        if adapter is not None:
            y = y + low_rank(flat, *adapter)
        return y.reshape(*x.shape[:-1], -1)


def over_blocks(
    module: Any, groups: Groups, call: Callable[[Any, Array, Array], Array]
) -> Callable[[Array], Array]:
    """Returns what applies one module of all experts to blocks.

    Args:
      module: The module; every array of it has a leading axis of experts.
      groups: The groups.
      call: (the module of a block's expert, the block's number, its rows) -> rows.

    Returns:
      (blocks, block, in) -> (blocks, block, out).
    """

    def kernel(path: tuple, variable: Any) -> bool:
        return path[-1] == FrozenLinear.WEIGHT and isinstance(variable, FrozenParam)

    graphdef, kernels, others = nnx.split(module, kernel, ...)
    # The adapters' factors and other small arrays are gathered at once, so that their
    # gradient is one sum and not one a block.
    others = jax.tree.map(lambda leaf: leaf[groups.owner], others)

    def one(own: Any, index: Array, rows: Array) -> Array:
        merged = nnx.merge(graphdef, kernels, own)

        def grouped(path: tuple, linear: FrozenLinear) -> FrozenLinear:
            frozen = isinstance(linear.kernel, FrozenParam)
            return GroupedLinear(linear, groups, index) if frozen else linear

        return call(replaced(merged, FrozenLinear, grouped), index, rows)

    numbers = jnp.arange(len(groups.owner), dtype=jnp.int32)
    return lambda rows: jax.vmap(one)(others, numbers, rows)


@functools.cache
def _of_a_block(name: str | None) -> Any:
    """Returns (rows, block's number, weight of all experts, groups) -> the product with that
    of the block's expert; vectorized over blocks it is `_grouped`."""

    @jax.custom_batching.custom_vmap
    def product(x: Array, index: Array, w: Any, groups: Groups) -> Array:
        return _plain(x, _expert(w, groups.owner[index]), name)

    @product.def_vmap
    def over_all(
        blocks: int, batched: Any, x: Array, index: Array, w: Any, groups: Any
    ):
        del index
        assert batched[0] and not any(jax.tree.leaves(batched[2:])), "only x has blocks"
        assert blocks == len(groups.owner)
        return _grouped(x, w, groups.ends, name), True

    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(
    x: Float[Array, "blocks block k"],
    w: Any,
    ends: Int[Array, " count"],
    name: str | None,
) -> Float[Array, "blocks block n"]:
    """Multiplies each block by its expert's weight, which has the shape (count, n, k).

    Differentiable to x only; backward keeps the weight as it is stored.
    """

    def one(rows: Array, weight: Any) -> Array:
        return _plain(rows, weight, name)

    return _through_experts(one, x, w, ends, w.shape[-2], name)


def _grouped_fwd(x, w, ends, name):
    return _grouped(x, w, ends, name), (w, ends)


def _grouped_bwd(name, residuals, dy):
    w, ends = residuals

    def one(rows: Array, weight: Any) -> Array:
        zero = jnp.zeros((rows.shape[0], w.shape[-1]), rows.dtype)
        # The product is linear, so that what it is at makes no difference.
        return jax.vjp(lambda x: _plain(x, weight, name), zero)[1](rows)[0]

    return _through_experts(one, dy, w, ends, w.shape[-1], name), None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _through_experts(
    one: Callable[[Array, Any], Array],
    x: Float[Array, "blocks block k"],
    w: Any,
    ends: Int[Array, " count"],
    out: int,
    name: str | None,
) -> Float[Array, "blocks block out"]:
    """Applies `one`, (rows, an expert's weight) -> rows, to each block that has tokens."""
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    with_tokens = jnp.nonzero(ends > starts, size=len(ends), fill_value=0)[0]

    def expert(i: Array, y: Array) -> Array:
        number = with_tokens[i]
        weight = _ready(_expert(w, number), x.dtype, name)

        def block(j: Array, y: Array) -> Array:
            rows = lax.dynamic_index_in_dim(x, j, keepdims=False)
            return lax.dynamic_update_index_in_dim(y, one(rows, weight), j, 0)

        return lax.fori_loop(starts[number], ends[number], block, y)

    y = jnp.zeros((*x.shape[:-1], out), x.dtype)
    return lax.fori_loop(0, jnp.sum(ends > starts), expert, y)


def _expert(w: Any, number: Array) -> Any:
    """Returns one expert's weight."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), w
    )


def _ready(w: Any, dtype: Any, name: str | None) -> Any:
    """Returns a weight decoded, where each of its products would decode it whole."""
    if not isinstance(w, PackedWeight) or name is not None:
        return w
    product = product_of(w)
    on_cpu = current_device().platform == "cpu"
    decodes = product is REFERENCE or (product.decodes and on_cpu)
    return w.decode_one(dtype) if decodes else w


def _plain(x: Array, w: Any, name: str | None) -> Array:
    """Computes x @ w.T of one weight, dense or packed."""
    if isinstance(w, PackedWeight):
        return product_of(w).plain(x, w, name)
    return frozen_matmul(x, w)


def _block_size(pairs: int, count: int) -> int:
    """Half of an expert's mean share, as a power of two: padding wastes about a fourth."""
    size = _SMALLEST_BLOCK
    while size < min(_LARGEST_BLOCK, pairs // (2 * count)):
        size *= 2
    return size
