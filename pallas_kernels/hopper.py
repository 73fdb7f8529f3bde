"""Fused NF4 products for Hopper (sm_90): wgmma with the weight decoded in registers.

  forward   y = x @ W.T (+ u @ v.T), computed as y.T: W is the operand that wgmma takes
            from registers, x comes from shared memory by TMA.
  backward  dx = dy @ W (+ u @ v.T), computed as dx.T, from the same bytes: a transposed
            load of a word tile has neighbours along n in a register.

Both are persistent: as many blocks as SMs, each walking over output tiles. One
warpgroup only issues TMA copies and runs ahead over tile borders; two compute. Of a
compute warpgroup's products one is always in flight while the next plane is decoded,
and the two warpgroups keep each other's tensor core busy. The low-rank pair (u, v) of a
LoRA adapter enters as more steps of the same loop: v goes through the weight's buffers
and straight to wgmma, so an adapted linear makes one trip of y through memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codebook as cb
from pallas_kernels import registers
from pallas_kernels.annotations import Array, Float, UInt16

_MEMORY_REGISTERS = 40
_transforms: Any = plgpu  # whose classes look abstract to a type checker
_SWIZZLED = (_transforms.TilingTransform((8, 64)), _transforms.SwizzleTransform(128))
_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a kernel is tiled; all of it static.

    Attributes:
      block_m: Tokens of an output tile: 8 to 256, a power of two.
      decoder: How codes become values; see registers.py.
      weight_stages: Word tiles in flight (backward with low rank: at least
        warpgroups * planes).
      x_stages: Tiles of x in flight.
      x_depth: Features of such a tile: 64, or 256 in forward for small block_m, where
        fewer and larger copies keep up with the products.
      minor: Axis that consecutive tiles run along, 'm' or 'n' ('n' is k in backward).
      width: Tiles they run along it before they step along the other.
      split_k: Parts that the contraction is cut in, so that few tiles fill all SMs.
      warpgroups: That compute: 2, or 4 for small m, where more warps hide latency.
      planes: Nibble planes a warpgroup owns in backward: 2, or 1 (with 4 warpgroups, or
        for block_m 256), which needs a table decoder.
      out_stages: Buffers of 64 tokens that a warpgroup's results leave through.
    """

    block_m: int = 128
    decoder: registers.Decoder = "permute"
    weight_stages: int = 3
    x_stages: int = 6
    x_depth: int = 64
    minor: str = "m"
    width: int = 8
    split_k: int = 1
    warpgroups: int = 2
    planes: int = 2
    out_stages: int = 2

    @property
    def exact(self) -> bool:
        """Whether decoded weights equal bitsandbytes' bit for bit."""
        return registers.decodes_exactly(self.decoder)

    @property
    def compute_registers(self) -> int:
        """Registers a thread of the computing warpgroups may take from the loader."""
        threads = self.warpgroups + 1
        total = 65536 // (128 * threads) // 8 * 8 * threads
        return (total - _MEMORY_REGISTERS) // self.warpgroups // 8 * 8

    @property
    def in_flight(self) -> int:
        """Uses of x whose products may run on while the next plane is decoded."""
        return 1 if self.warpgroups == 2 else 0  # more would not fit the registers


@dataclasses.dataclass(frozen=True)
class _Ring:
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


def _run_roles(
    config: Config,
    rings: list[_Ring],
    load: Callable[[], None],
    compute: Callable[[Array], None],
) -> None:
    """Runs `load` in the last warpgroup and `compute(warpgroup)` in the others."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == config.warpgroups)
    def _():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
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


def _tile(
    linear: Array, mi: int, ni: int, config: Config
) -> tuple[Array, Array, Array]:
    """Returns the split, and the tile's index along m and along the other axis."""
    split = lax.div(linear, jnp.int32(mi * ni))
    linear = lax.rem(linear, jnp.int32(mi * ni))
    minor = 0 if config.minor == "m" else 1
    i, j = plgpu.planar_snake(linear, (mi, ni), minor, config.width)
    return split, i, j


def _start(number: Any, unit: int, size: int) -> Any:
    """Returns where a unit starts; of a ragged axis the last reaches back to end with it."""
    start = number * unit
    return start if size % unit == 0 else jnp.minimum(start, size - unit)


def _in_first_split(steps: int, split: Array, config: Config) -> Any:
    return steps if config.split_k == 1 else jnp.where(split == 0, steps, 0)


def _store_transposed(acc: Array, staging: Any, out: Any) -> None:
    """Writes acc (64, m) to out (m, 64) through shared memory, chunk by chunk of m."""
    slots, chunk, _ = staging.shape
    for number, start in enumerate(range(0, acc.shape[1], chunk)):
        slot = number % slots
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        part = plgpu.layout_cast(acc[:, start : start + chunk], _WGMMA)
        part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        staging.at[slot].transpose((1, 0))[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[slot], out.at[pl.ds(start, chunk)])


class _Multiplier:
    """Issues a warpgroup's products, and frees each x buffer when its last has ended."""

    def __init__(self, ring: _Ring, in_flight: int, staging: Any | None):
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
          slot: Of the x ring.
          products: Accumulators and register operands.
          column: Of the buffer, where the 64 features lie.
          first: Whether no product is in flight from before (bool, or traced).
          starts: Whether these are the first products of this slot's use.
          ends: Whether they are the last.
        """
        if starts:
            self.ring.wait(slot)
        x = self.ring.buffers[0].at[slot, :, pl.ds(column, 64)].transpose((1, 0))
        if self.staging is None:
            products = [(acc, registers.pin(a, _WGMMA)) for acc, a in products]
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


def _scale(values: Array, scale: Array, axis: int, dtype: jnp.dtype) -> Array:
    return (values * lax.broadcast_in_dim(scale, values.shape, (axis,))).astype(dtype)


def _launch(
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


def forward(
    x: Float[Array, "m k"],
    codes: UInt16[Array, "n words"],
    scales: Float[Array, "blocks n"],
    addend: tuple[Array, Array] | None = None,
    *,
    config: Config,
    codebook: cb.Codebook,
    num_sms: int,
    interpret: Any = False,
) -> Float[Array, "..."]:
    """Computes x @ W.T, plus u @ v.T of an addend (u (m, r), v (n, r)).

    Args:
      x: bfloat16 or float16; m a multiple of config.block_m, k of 256 * config.split_k.
      codes: planar256 words, (n, k/4); n a multiple of 8, and at least a tile's rows,
        64 * config.warpgroups. Of a ragged n the last tile does rows of the one before
        once more.
      scales: One a block of 64, (k/64, n): float32 for exact decoders, else x's dtype.
      addend: In x's dtype, r a multiple of 64.
      config: Tiling.
      codebook: Of the codes.
      num_sms: Blocks to launch.
      interpret: Parameters of the interpreter; needs the 'select' decoder.

    Returns:
      (m, n) in x's dtype; with split_k > 1 float32 parts (split_k, n, m) to be summed.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, splits = config.block_m, 64 * config.warpgroups, config.split_k
    mi, ni, steps = m // bm, -(-n // bn), k // 256 // splits
    low_rank = 0 if addend is None else addend[0].shape[1] // 64
    order = [p for half in (0, 1) for p in registers.plane_pair(config.decoder, half)]
    uses = 256 // config.x_depth  # slots of x in a step

    def kernel(x_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_ring = _Ring(**parts["x"], slots=config.x_stages)
        w_ring = _Ring(**parts["w"], slots=config.weight_stages)

        def each_tile(body):
            """Calls body(split, its low-rank steps, token slice, row start, slots)."""

            @plgpu.nd_loop(
                (splits * mi * ni,),
                collective_axes="sm",
                init_carry=(jnp.int32(0), jnp.int32(0)),
            )
            def _(info, carry):
                split, i, j = _tile(info.index[0], mi, ni, config)
                extra = _in_first_split(low_rank, split, config)
                row = _start(j, bn, n)
                return body(split, extra, pl.ds(i * bm, bm), row, carry)

        def load():
            def tile(split, extra, tokens, row, carry):
                rows = pl.ds(row, bn)

                def step(s, carry):
                    w_slot, x_slot = carry
                    at = split * steps + s
                    w_ring.fill(
                        w_slot,
                        w_g.at[rows, pl.ds(at * 64, 64)],
                        s_g.at[pl.ds(at * 4, 4), rows],
                    )
                    if uses == 1:
                        x_ring.fill(x_slot, x_g.at[tokens, pl.ds(at * 256, 256)])
                    else:
                        for position, plane in enumerate(order):
                            columns = pl.ds(at * 256 + plane * 64, 64)
                            x_ring.fill(
                                x_ring.after(x_slot, position), x_g.at[tokens, columns]
                            )
                    return w_ring.after(w_slot), x_ring.after(x_slot, uses)

                def low_rank_step(s, carry):
                    w_slot, x_slot = carry
                    columns = pl.ds(s * 64, 64)
                    # The slot's second copy is not used, but its barrier counts it.
                    w_ring.fill(
                        w_slot, uv[1].at[rows, columns], s_g.at[pl.ds(0, 4), rows]
                    )
                    # A whole buffer, of which only the first 64 columns are used.
                    columns = pl.ds(s * 64, config.x_depth)
                    x_ring.fill(x_slot, uv[0].at[tokens, columns])
                    return w_ring.after(w_slot), x_ring.after(x_slot)

                carry = lax.fori_loop(0, steps, step, carry)
                if low_rank:
                    carry = lax.fori_loop(0, extra, low_rank_step, carry)
                return carry

            each_tile(tile)

        def compute(wg):
            own = pl.ds(wg * 64, 64)
            words_s, scales_s = w_ring.buffers
            multiply = _Multiplier(
                x_ring,
                config.in_flight,
                parts["staging"].at[wg] if interpret else None,
            )

            def tile(split, extra, tokens, row, carry):
                def with_accumulator(acc):
                    def step(s, carry):
                        w_slot, x_slot = carry
                        w_ring.wait(w_slot)
                        words = plgpu.load(words_s.at[w_slot, own], layout=_WGMMA)
                        scale = [
                            plgpu.load(
                                scales_s.at[w_slot, p, own], layout=_WGMMA.reduce(1)
                            )
                            for p in order
                        ]
                        for half in (0, 1):
                            values = registers.decode_pair(
                                words,
                                half,
                                decoder=config.decoder,
                                codebook=codebook,
                                dtype=x.dtype,
                                layout=_WGMMA,
                                table=parts.get("table"),
                            )
                            for i in (0, 1):
                                position = 2 * half + i
                                a = _scale(values[i], scale[position], 0, x.dtype)
                                whole = uses == 1  # one use for all four planes
                                multiply(
                                    x_slot if whole else x_ring.after(x_slot, position),
                                    [(acc, a)],
                                    column=64 * order[position] if whole else 0,
                                    first=s == 0 if position == 0 else False,
                                    starts=not whole or position == 0,
                                    ends=not whole or position == 3,
                                )
                        w_ring.release(w_slot)
                        return w_ring.after(w_slot), x_ring.after(x_slot, uses)

                    def low_rank_step(s, carry):
                        w_slot, x_slot = carry
                        # One product a turn: its registers are the next turn's too.
                        plgpu.wgmma_wait(0)
                        w_ring.wait(w_slot)
                        bits = plgpu.load(words_s.at[w_slot, own], layout=_WGMMA)
                        a = lax.bitcast_convert_type(bits, x.dtype)
                        multiply(x_slot, [(acc, a)])
                        w_ring.release(w_slot)
                        return w_ring.after(w_slot), x_ring.after(x_slot)

                    after = lax.fori_loop(0, steps, step, carry)
                    if low_rank:
                        after = lax.fori_loop(0, extra, low_rank_step, after)
                    multiply.finish(after[1])
                    rows = pl.ds(row + wg * 64, 64)
                    if splits > 1:
                        registers.store(acc[...], out_g.at[split, rows, tokens])
                    else:
                        _store_transposed(
                            acc[...].astype(x.dtype),
                            parts["out"].at[wg],
                            out_g.at[tokens, rows],
                        )
                    return after

                return pl.run_scoped(with_accumulator, plgpu.ACC((64, bm), jnp.float32))

            each_tile(tile)

        _run_roles(config, [x_ring, w_ring], load, compute)

    if addend is not None:  # so that the last low-rank step can fill a buffer
        u = jnp.pad(addend[0], ((0, 0), (0, config.x_depth - 64)))
        addend = (u, addend[1])
    return _launch(
        kernel,
        [x, codes, scales, *_addend_operands(addend)],
        _out_type(m, n, x.dtype, config),
        _scratch(config, x.dtype, (bn, 64), (4, bn), scales.dtype),
        min(num_sms, splits * mi * ni),
        config,
        codebook,
        interpret,
    )


def backward(
    dy: Float[Array, "m n"],
    codes: UInt16[Array, "n words"],
    scales: Float[Array, "blocks n"],
    addend: tuple[Array, Array] | None = None,
    *,
    config: Config,
    codebook: cb.Codebook,
    num_sms: int,
    interpret: Any = False,
) -> Float[Array, "..."]:
    """Computes dy @ W, plus u @ v.T of an addend (u (m, r), v (k, r)).

    Each warpgroup decodes only the nibble planes whose columns of dx it owns.

    Args:
      dy: bfloat16 or float16; m a multiple of config.block_m, n of 8 and at least 64, its
        pieces of 64 (one may be ragged) a multiple of config.split_k.
      codes, scales, addend, config, codebook, num_sms, interpret: As in `forward`.

    Returns:
      (m, k) in dy's dtype; with split_k > 1 float32 parts (split_k, k, m) to be summed.
    """
    m, n = dy.shape
    k = codes.shape[1] * 4
    bm, planes, splits = config.block_m, config.planes, config.split_k
    owners = config.warpgroups
    shares = 4 // (owners * planes)  # tiles that share a group of words
    mi, ki, steps = m // bm, k // 256 * shares, -(-n // 64) // splits
    low_rank = 0 if addend is None else addend[0].shape[1] // 64

    def owned(share: Array, wg: Array | int, i: int) -> Any:
        """The i-th plane that a warpgroup owns."""
        if planes == 1:
            return owners * share + wg
        if config.decoder == "permute":  # plane_pair, for a traced warpgroup
            return 2 * wg + i
        return wg + 2 * i

    def kernel(dy_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_ring = _Ring(**parts["x"], slots=config.x_stages)
        w_ring = _Ring(**parts["w"], slots=config.weight_stages)

        def each_tile(body):
            """Calls body(split, low-rank steps, token slice, group, share of it, slots)."""

            @plgpu.nd_loop(
                (splits * mi * ki,),
                collective_axes="sm",
                init_carry=(jnp.int32(0), jnp.int32(0)),
            )
            def _(info, carry):
                split, i, j = _tile(info.index[0], mi, ki, config)
                group, share = lax.div(j, jnp.int32(shares)), lax.rem(j, shares)
                extra = _in_first_split(low_rank, split, config)
                return body(split, extra, pl.ds(i * bm, bm), group, share, carry)

        def load():
            def tile(split, extra, tokens, group, share, carry):
                def step(s, carry):
                    w_slot, x_slot = carry
                    at = split * steps + s
                    rows = pl.ds(_start(at, 64, n), 64)
                    w_ring.fill(
                        w_slot,
                        w_g.at[rows, pl.ds(group * 64, 64)],
                        s_g.at[pl.ds(group * 4, 4), rows],
                    )
                    x_ring.fill(x_slot, dy_g.at[tokens, pl.ds(at * 64, 64)])
                    return w_ring.after(w_slot), x_ring.after(x_slot)

                def low_rank_step(s, carry):
                    w_slot, x_slot = carry
                    columns = pl.ds(s * 64, 64)
                    for number in range(owners * planes):
                        plane = owned(share, number // planes, number % planes)
                        w_ring.fill(
                            w_ring.after(w_slot, number),
                            uv[1].at[pl.ds(group * 256 + plane * 64, 64), columns],
                            s_g.at[pl.ds(group * 4, 4), pl.ds(0, 64)],
                        )
                    x_ring.fill(x_slot, uv[0].at[tokens, columns])
                    w_slot = w_ring.after(w_slot, owners * planes)
                    return w_slot, x_ring.after(x_slot)

                carry = lax.fori_loop(0, steps, step, carry)
                if low_rank:
                    carry = lax.fori_loop(0, extra, low_rank_step, carry)
                return carry

            each_tile(tile)

        def compute(wg):
            words_s, scales_s = w_ring.buffers
            multiply = _Multiplier(
                x_ring,
                config.in_flight,
                parts["staging"].at[wg] if interpret else None,
            )

            def decode(words, share):
                options: dict[str, Any] = {
                    "decoder": config.decoder,
                    "dtype": dy.dtype,
                    "layout": _WGMMA,
                }
                table = parts.get("table")
                if planes == 1:
                    bits = 4 * owned(share, wg, 0)
                    return [registers.decode_one(words, bits, table=table, **options)]
                return registers.decode_pair(
                    words,
                    0,
                    codebook=codebook,
                    table=table,
                    shift=wg * registers.pair_shift(config.decoder),
                    **options,
                )

            def tile(split, extra, tokens, group, share, carry):
                def with_accumulators(*accs):
                    def step(s, carry):
                        w_slot, x_slot = carry
                        w_ring.wait(w_slot)
                        words = plgpu.load(
                            words_s.at[w_slot].transpose((1, 0)), layout=_WGMMA
                        )
                        scale = [
                            plgpu.load(
                                scales_s.at[w_slot, owned(share, wg, i)],
                                layout=_WGMMA.reduce(0),
                            )
                            for i in range(planes)
                        ]
                        values = decode(words, share)
                        products = [
                            (acc, _scale(v, c, 1, dy.dtype))
                            for acc, v, c in zip(accs, values, scale, strict=True)
                        ]
                        multiply(x_slot, products, first=s == 0)
                        w_ring.release(w_slot)
                        return w_ring.after(w_slot), x_ring.after(x_slot)

                    def low_rank_step(s, carry):
                        w_slot, x_slot = carry
                        plgpu.wgmma_wait(0)
                        slots = owners * planes
                        for number in range(slots):
                            w_ring.wait(w_ring.after(w_slot, number))
                        bits = [
                            plgpu.load(
                                words_s.at[w_ring.after(w_slot, wg * planes + i)],
                                layout=_WGMMA,
                            )
                            for i in range(planes)
                        ]
                        values = [lax.bitcast_convert_type(b, dy.dtype) for b in bits]
                        multiply(x_slot, list(zip(accs, values, strict=True)))
                        for number in range(slots):
                            w_ring.release(w_ring.after(w_slot, number))
                        w_slot = w_ring.after(w_slot, slots)
                        return w_slot, x_ring.after(x_slot)

                    # Two steps a turn, so that a turn's first operands have registers
                    # other than those that the last one's products still read.
                    def two_steps(turn, carry):
                        return step(2 * turn + 1, step(2 * turn, carry))

                    after = lax.fori_loop(0, steps // 2, two_steps, carry)
                    if steps % 2:
                        # Made while products are in flight, its operands would have
                        # them all run one by one (C7513).
                        plgpu.wgmma_wait(0)
                        after = step(steps - 1, after)
                    if low_rank:
                        after = lax.fori_loop(0, extra, low_rank_step, after)
                    multiply.finish(after[1])
                    for i, acc in enumerate(accs):
                        columns = pl.ds(group * 256 + owned(share, wg, i) * 64, 64)
                        if splits > 1:
                            registers.store(acc[...], out_g.at[split, columns, tokens])
                            continue
                        _store_transposed(
                            acc[...].astype(dy.dtype),
                            parts["out"].at[wg],
                            out_g.at[tokens, columns],
                        )
                    return after

                accumulators = [plgpu.ACC((64, bm), jnp.float32)] * planes
                return pl.run_scoped(with_accumulators, *accumulators)

            each_tile(tile)

        _run_roles(config, [x_ring, w_ring], load, compute)

    if tail := n % 64:  # nothing for rows that the last step takes once more
        whole = n - tail
        gap = jnp.zeros((m, 64 - tail), dy.dtype)
        dy = jnp.concatenate([dy[:, :whole], gap, dy[:, whole:]], axis=1)
    return _launch(
        kernel,
        [dy, codes, scales, *_addend_operands(addend)],
        _out_type(m, k, dy.dtype, config),
        _scratch(config, dy.dtype, (64, 64), (4, 64), scales.dtype),
        min(num_sms, splits * mi * ki),
        config,
        codebook,
        interpret,
    )


def _addend_operands(addend: tuple[Array, Array] | None) -> list[Array]:
    if addend is None:
        return []
    u, v = addend
    return [u, lax.bitcast_convert_type(v, jnp.uint16)]  # v in the words' buffers


def _scratch(
    config: Config,
    dtype: jnp.dtype,
    words: tuple[int, int],
    scales: tuple[int, int],
    scale_dtype: jnp.dtype,
) -> dict[str, Any]:
    bm, chunk = config.block_m, min(64, config.block_m)
    scratch: dict[str, Any] = {
        "x": _Ring.scratch(
            config.x_stages,
            config.warpgroups,
            plgpu.SMEM(
                (config.x_stages, bm, config.x_depth), dtype, transforms=_SWIZZLED
            ),
        ),
        "w": _Ring.scratch(
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


def _out_type(
    m: int, columns: int, dtype: jnp.dtype, config: Config
) -> jax.ShapeDtypeStruct:
    if config.split_k == 1:
        return jax.ShapeDtypeStruct((m, columns), dtype)
    return jax.ShapeDtypeStruct((config.split_k, columns, m), jnp.float32)
