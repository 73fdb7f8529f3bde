"""What both directions of 'hopper' are made of: rings, roles, products, the launch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul import registers
from pallas_kernels.packed_matmul.hopper.config import MEMORY_REGISTERS, Config

WGMMA = plgpu.Layout.WGMMA
_transforms: Any = plgpu  # whose classes look abstract to a type checker
_SWIZZLED = (_transforms.TilingTransform((8, 64)), _transforms.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that one warpgroup fills by TMA and the others read, in order.

    Filler and readers go over the slots in the same order, round and round.
    """

    buffers: tuple[Any, ...]
    full: Any
    free: Any
    slots: int

    @staticmethod
    def scratch(slots: int, readers: int, *buffers: Any) -> dict[str, Any]:
        """Returns the scratch types: `buffers` have a leading axis of `slots`."""
        return {
            "buffers": buffers,
            "full": plgpu.Barrier(num_arrivals=len(buffers), num_barriers=slots),
            "free": plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        }

    def after(self, slot: Array, uses: int | Array = 1) -> Array:
        """Returns the slot that many uses later (if traced, fewer than slots)."""
        later = slot + (uses % self.slots if isinstance(uses, int) else uses)
        if self.slots & (self.slots - 1) == 0:
            return later & (self.slots - 1)
        return jnp.where(later >= self.slots, later - self.slots, later)

    def before(self, slot: Array) -> Array:
        """Returns the slot of the use before."""
        return self.after(slot, self.slots - 1)

    def fill(self, slot: Array, *sources: Any) -> None:
        """Waits until the slot is free and copies into each of its buffers."""
        plgpu.barrier_wait(self.free.at[slot])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def wait(self, slot: Array) -> None:
        """Waits until the slot is filled."""
        plgpu.barrier_wait(self.full.at[slot])

    def release(self, slot: Array) -> None:
        """Frees the slot; after the products of what was loaded from it are issued,
        as nothing else orders a load before this."""
        plgpu.barrier_arrive(self.free.at[slot])

    def open(self) -> None:
        """Marks every slot free; once, by each reader."""
        for slot in range(self.slots):
            plgpu.barrier_arrive(self.free.at[slot])

    def close(self) -> None:
        """Waits for the last releases, so that no barrier is left half way."""
        for slot in range(self.slots):
            plgpu.barrier_wait(self.free.at[slot])


def run_roles(
    config: Config,
    rings: list[Ring],
    load: Callable[[], None],
    compute: Callable[[Array], None],
) -> None:
    """Runs `load` in the last warpgroup and `compute(warpgroup)` in the others."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == config.warpgroups)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        load()
        for ring in rings:
            ring.close()

    @pl.when(warpgroup < config.warpgroups)
    def _():
        plgpu.set_max_registers(config.compute_registers, action="increase")
        for ring in rings:
            ring.open()
        compute(warpgroup)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def start_of(number: Any, unit: int, size: int) -> Any:
    """Returns where a unit starts; of a ragged axis the last reaches back to end with it."""
    start = number * unit
    return start if size % unit == 0 else jnp.minimum(start, size - unit)


def store_transposed(acc: Array, staging: Any, out: Any) -> None:
    """Writes acc (64, m) to out (m, 64) through shared memory, chunk by chunk of m."""
    slots, chunk, _ = staging.shape
    for number, start in enumerate(range(0, acc.shape[1], chunk)):
        slot = number % slots
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        part = plgpu.layout_cast(acc[:, start : start + chunk], WGMMA)
        part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        staging.at[slot].transpose((1, 0))[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[slot], out.at[pl.ds(start, chunk)])


class Multiplier:
    """Issues a warpgroup's products, and frees each x buffer when its last has ended."""

    def __init__(self, ring: Ring, in_flight: int, staging: Any | None):
        self.ring, self.in_flight, self.staging = ring, in_flight, staging

    def __call__(
        self,
        slot: Array,
        products: list[tuple[Any, Array]],
        *,
        column: int = 0,
        first: Any = False,
        starts: bool = True,
        ends: bool = True,
    ) -> None:
        """Computes acc += a @ x[slot].T for each (acc, a); leaves them in flight.

        Args:
          slot: The slot of the x ring to multiply by.
          products: Accumulators and register operands.
          column: The column of the slot's buffer where the 64 features begin.
          first: Whether no product is in flight from before (bool, or traced).
          starts: Whether these are the first products of this slot's use.
          ends: Whether they are the last.
        """
        if starts:
            self.ring.wait(slot)
        x = self.ring.buffers[0].at[slot, :, pl.ds(column, 64)].transpose((1, 0))
        if self.staging is None:
            products = [(acc, registers.pin(a, WGMMA)) for acc, a in products]
        for acc, a in products:
            if self.staging is not None:  # the interpreter takes none from registers
                plgpu.wgmma_wait(0)
                self.staging[...] = a
                plgpu.commit_smem()
                a = self.staging
            plgpu.wgmma(acc, a, x)
        if not self.in_flight or self.staging is not None:
            plgpu.wgmma_wait(0)
        else:
            plgpu.wgmma_wait(len(products))
        if not self.in_flight and ends:
            self.ring.release(slot)
        elif self.in_flight and starts:

            @pl.when(jnp.logical_not(first))
            def _():
                self.ring.release(self.ring.before(slot))

    def finish(self, slot: Array) -> None:
        """Waits for the last products; `slot` is the one after theirs."""
        plgpu.wgmma_wait(0)
        if self.in_flight:
            self.ring.release(self.ring.before(slot))


def launch(
    kernel: Callable[..., None],
    operands: list[Array],
    out: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    blocks: int,
    config: Config,
    codebook: cb.Codebook,
    interpret: Any,
) -> Array:
    """Calls kernel(*operand refs, out ref, scratch), the decoder's table loaded."""
    dtype = operands[0].dtype
    table = registers.table_words(codebook, dtype, config.decoder)
    if interpret:
        scratch["staging"] = plgpu.SMEM(
            (config.warpgroups, 64, 64), dtype, transforms=_SWIZZLED
        )
    if table is not None:
        operands = [*operands, jnp.asarray(table)]
        scratch["table"] = plgpu.SMEM(registers.TABLE_SHAPE, jnp.uint32)
        scratch["table_full"] = plgpu.Barrier(num_arrivals=config.warpgroups)

    def body(*refs):
        *refs, out_ref, parts = refs
        if table is not None:
            *refs, table_ref = refs

            @pl.when(lax.axis_index("wg") < config.warpgroups)
            def _():
                registers.fill_table(table_ref, parts["table"])
                plgpu.barrier_arrive(parts["table_full"])
                plgpu.barrier_wait(parts["table_full"])

        kernel(*refs, out_ref, parts)

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types=(scratch,),
    )(*operands)


def scratch_types(
    config: Config,
    dtype: jnp.dtype,
    words: tuple[int, int],
    scales: tuple[int, int],
    scale_dtype: jnp.dtype,
) -> dict[str, Any]:
    """Returns a kernel's shared memory.

    Args:
      config: Tiling.
      dtype: The dtype of x, or of dy in backward.
      words: The shape of a word tile.
      scales: The shape of a word tile's scales.
      scale_dtype: The dtype of the scales.
    """
    bm, chunk = config.block_m, min(64, config.block_m)
    scratch: dict[str, Any] = {
        "x": Ring.scratch(
            config.x_stages,
            config.warpgroups,
            plgpu.SMEM(
                (config.x_stages, bm, config.x_depth), dtype, transforms=_SWIZZLED
            ),
        ),
        "w": Ring.scratch(
            config.weight_stages,
            config.warpgroups,
            plgpu.SMEM(
                (config.weight_stages, *words), jnp.uint16, transforms=_SWIZZLED
            ),
            plgpu.SMEM((config.weight_stages, *scales), scale_dtype),
        ),
    }
    if config.split_k == 1:
        slots = min(config.out_stages, bm // chunk)
        scratch["out"] = plgpu.SMEM(
            (config.warpgroups, slots, chunk, 64), dtype, transforms=_SWIZZLED
        )
    return scratch
