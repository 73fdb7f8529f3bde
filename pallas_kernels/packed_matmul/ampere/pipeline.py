"""What both directions of 'ampere' are made of: products, copies, waits, the launch.

A wait for copies counts groups: each copy is one, they end in order, and only those that
were begun after the one waited for may be left. So every turn begins the same copies;
behind the end of the contraction they repeat the last.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.annotations import Array
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul import registers
from pallas_kernels.packed_matmul.ampere.config import Config

_transforms: Any = plgpu  # whose classes look abstract to a type checker
_CHUNK = 32
"""Tokens whose x a warp has in registers at a time."""


class Multiplier:
    """Sums of a tile in registers: by group of rows, by chunk of tokens."""

    def __init__(self, config: Config, dtype: jnp.dtype, groups: int, rows: int):
        self.left = plgpu.Layout.MMA_LHS(dtype)
        self.right = plgpu.Layout.MMA_RHS(dtype)
        self.sums = plgpu.Layout.MMA_ACC(dtype)
        self.dtype = dtype
        self.chunk = min(_CHUNK, config.block_m)
        self.chunks = config.block_m // self.chunk
        self.groups, self.rows = groups, rows

    def zeros(self):
        """Returns sums to begin with."""
        zero = jnp.zeros((self.rows, self.chunk), jnp.float32)
        zero = plgpu.layout_cast(zero, self.sums)
        return ((zero,) * self.chunks,) * self.groups

    def add(self, sums, operands: dict[int, Array], x_s):
        """Adds to each group of rows its operand (rows, depth) times x_s (tokens, depth)."""
        sums = [list(group) for group in sums]
        for i in range(self.chunks):
            tokens = x_s.at[pl.ds(i * self.chunk, self.chunk)]
            b = plgpu.load(tokens.transpose((1, 0)), layout=self.right)
            for group, a in operands.items():
                sums[group][i] = plgpu.mma(sums[group][i], a, b)
        return tuple(tuple(group) for group in sums)

    def store(self, sums, group: int, out, split):
        """Writes a group to out (m, rows), or as float32 to its part of (splits, rows, m)."""
        for i, part in enumerate(sums[group]):
            tokens = pl.ds(i * self.chunk, self.chunk)
            if split is not None:
                registers.store(part, out.at[split, :, tokens])
                continue
            # Neighbours along m become neighbours along n: two words a store.
            part = plgpu.layout_cast(part.astype(self.dtype), plgpu.Layout.WGMMA)
            part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            registers.store(part, out.at[tokens].transpose((1, 0)))


def copy(source: Any, target: Any) -> None:
    """Begins a copy to shared memory, by all threads: one group."""
    plgpu.copy_gmem_to_smem(
        source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    )


def wait(left: int = 0) -> None:
    """Waits for all but so many of the last copies, and for all threads."""
    plgpu.wait_gmem_to_smem(left)


def after(slot: Array, uses: int, slots: int) -> Array:
    """Returns the slot of a ring that many uses later."""
    later = slot + uses % slots
    return jnp.where(later >= slots, later - slots, later)


def launch(
    kernel: Callable[..., None],
    operands: list[Array],
    out: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    tiles: int,
    num_sms: int,
    config: Config,
    codebook: cb.Codebook,
    interpret: Any,
) -> Array:
    """Calls kernel(*operand refs, out ref, scratch) for each tile's index."""
    table = registers.table_words(codebook, operands[0].dtype, config.decoder)
    if table is not None:
        # Spread over the lanes already: 64 KiB that a block reads once, from L2.
        operands = [*operands, jnp.tile(jnp.asarray(table), (1, 32))]
        scratch["table"] = plgpu.SMEM(registers.TABLE_SHAPE, jnp.uint32)

    def body(*refs):
        *refs, out_ref, parts = refs
        if table is not None:
            *refs, table_ref = refs
            copy(table_ref, parts["table"])
            wait()

        @plgpu.nd_loop((tiles,), collective_axes="sm")
        def _(info):
            kernel(info.index[0], *refs, out_ref, parts)

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(min(tiles, num_sms * config.blocks_per_sm),),
        grid_names=("sm",),
        interpret=interpret,
        scratch_types=(scratch,),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )(*operands)


def swizzled(columns: int, rows: int = 64) -> tuple[Any, ...]:
    """Returns the layout of 16-bit tiles in shared memory that loads have no bank conflicts in.

    Each warp copies some of the pieces of 8 rows: there must be four or more.
    """
    columns //= max(1, 32 // rows)
    return (
        _transforms.TilingTransform((8, columns)),
        _transforms.SwizzleTransform(2 * columns),
    )


def by_tile(scales: Array, width: int) -> Array:
    """Reorders scales (k/64, n) to (k/256, n/width, 4, width).

    A copy of scales is linear: those of a tile of rows and a group of words must be one
    behind the other.
    """
    blocks, n = scales.shape
    return scales.reshape(blocks // 4, 4, n // width, width).transpose(0, 2, 1, 3)
