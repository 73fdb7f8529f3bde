"""Fused NF4 products for Ampere and Ada (sm_80, 86, 89): mma.sync and cp.async.

  forward   y = x @ W.T (+ u @ v.T), computed as y.T: W is the first operand, decoded in
            registers, each weight by one warp only.
  backward  dx = dy @ W (+ u @ v.T), computed as dx.T, from the same bytes: a transposed
            load of a word tile has neighbours along n in a register.

Blocks of four warps, `blocks_per_sm` on each SM, walk over output tiles. A warp takes a
quarter of a tile's rows and all of its tokens. Copies run some turns ahead of the
products within a tile; while one block starts or stores a tile, the others multiply. The
low-rank pair (u, v) of a LoRA adapter is multiplied first, through the same buffers.

Proved by compilation alone: no Ampere or Ada card has run it yet, so it runs only where it
is asked for by name.

A wait for copies counts groups: each copy is one, they end in order, and only those that
were begun after the one waited for may be left. So every turn begins the same copies;
behind the end of the contraction they repeat the last.
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

_transforms: Any = plgpu  # whose classes look abstract to a type checker
_CHUNK = 32
"""Tokens whose x a warp has in registers at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a kernel is tiled; all of it static.

    Attributes:
      block_m: Tokens of an output tile: 8 to 128, a power of two.
      rows: Rows of an output tile. Forward: of n, 64 or 128. Backward: of k, 128 or 256,
        which are two or four nibble planes of 64 words.
      decoder: How codes become values; see registers.py. The tables take 64 KiB.
      depth: Forward: words along k of a step, 32, or 64 for small block_m.
      x_stages: Turns (of half a step forward, a step backward) whose x is in shared
        memory, 2 or more.
      weight_stages: Word tiles in shared memory, 2 or more. Forward x_stages is less than
        twice of it; backward it equals x_stages.
      minor: Axis that consecutive tiles run along, 'm' or 'n' ('n' is k in backward).
      width: Tiles they run along it before they step along the other.
      split_k: Parts that the contraction is cut in, so that few tiles fill all SMs.
      blocks_per_sm: Blocks on an SM; shared memory must hold the buffers of all.
    """

    block_m: int = 64
    rows: int = 128
    decoder: registers.Decoder = "permute"
    depth: int = 32
    x_stages: int = 3
    weight_stages: int = 2
    minor: str = "m"
    width: int = 8
    split_k: int = 1
    blocks_per_sm: int = 2

    @property
    def exact(self) -> bool:
        """Whether decoded weights equal bitsandbytes' bit for bit."""
        return registers.decodes_exactly(self.decoder)


class _Multiplier:
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


def _copy(source: Any, target: Any) -> None:
    """Begins a copy to shared memory, by all threads: one group."""
    plgpu.copy_gmem_to_smem(
        source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    )


def _wait(left: int = 0) -> None:
    """Waits for all but so many of the last copies, and for all threads."""
    plgpu.wait_gmem_to_smem(left)


def _after(slot: Array, uses: int, slots: int) -> Array:
    later = slot + uses % slots
    return jnp.where(later >= slots, later - slots, later)


def _scale(values: Array, scale: Array, axis: int, layout: Any, dtype: jnp.dtype):
    scale = lax.broadcast_in_dim(scale, values.shape, (axis,))
    return (values * plgpu.layout_cast(scale, layout)).astype(dtype)


def _tile(
    linear: Array, mi: int, ni: int, config: Config
) -> tuple[Array, Array, Array]:
    """Returns the split, and the tile's index along m and along the other axis."""
    split = lax.div(linear, jnp.int32(mi * ni))
    linear = lax.rem(linear, jnp.int32(mi * ni))
    minor = 0 if config.minor == "m" else 1
    i, j = plgpu.planar_snake(linear, (mi, ni), minor, config.width)
    return split, i, j


def _launch(
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
            _copy(table_ref, parts["table"])
            _wait()

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

    A step covers `depth` words of each row, so four strips of k; its two turns multiply
    two planes each.

    Args:
      x: bfloat16 or float16; m a multiple of config.block_m, k of 256 * config.split_k.
      codes: planar256 words, (n, k/4); n a multiple of config.rows.
      scales: One a block of 64, (k/64, n): float32 for exact decoders, else x's dtype.
      addend: In x's dtype, r a multiple of 64.
      config: Tiling.
      codebook: Of the codes.
      num_sms: Streaming multiprocessors of the device.
      interpret: Parameters of the interpreter, which knows neither mma nor cp.async.

    Returns:
      (m, n) in x's dtype; with split_k > 1 float32 parts (split_k, n, m) to be summed.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, depth, splits = config.block_m, config.rows, config.depth, config.split_k
    x_stages, w_stages = config.x_stages, config.weight_stages
    mi, ni, steps = m // bm, n // bn, k // (4 * depth) // splits
    low_rank = 0 if addend is None else addend[0].shape[1] // 64
    pairs = [registers.plane_pair(config.decoder, half) for half in (0, 1)]
    strips = 64 // depth
    multiplier = _Multiplier(config, x.dtype, 1, bn)
    assert 2 <= x_stages < 2 * w_stages, config

    def kernel(linear, x_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_s, w_s, s_s = parts["x"], parts["words"], parts["scales"]
        split, i, j = _tile(linear, mi, ni, config)
        tokens, rows = pl.ds(i * bm, bm), pl.ds(j * bn, bn)

        def place(step):
            """Group of 256 elements, and strip of its planes."""
            step = split * steps + jnp.minimum(step, steps - 1)
            return lax.div(step, jnp.int32(strips)), lax.rem(step, jnp.int32(strips))

        def fetch_words(step, slot):
            group, strip = place(step)
            columns = pl.ds(group * 64 + strip * depth, depth)
            _copy(w_g.at[rows, columns], w_s.at[slot])
            _copy(s_g.at[group, j], s_s.at[slot])

        def fetch_x(step, half, slot):
            group, strip = place(step)
            for number, plane in enumerate(pairs[half]):
                column = group * 256 + plane * 64 + strip * depth
                _copy(x_g.at[tokens, pl.ds(column, depth)], x_s.at[slot, number])

        def fetch_ahead(turn):
            """Begins what a turn before the first would have begun."""
            if turn % 2 == 0:
                step = turn // 2 + w_stages - 1
                fetch_words(jnp.int32(step), step)
            if (use := turn + x_stages - 1) >= 0:
                fetch_x(jnp.int32(use // 2), use % 2, use)

        def low_rank_step(s, sums):
            for strip in range(strips):
                columns = pl.ds(s * 64 + strip * depth, depth)
                _copy(uv[1].at[rows, columns], w_s.at[strip])
                _copy(uv[0].at[tokens, columns], x_s.at[0, strip])
            _wait()
            for strip in range(strips):
                bits = plgpu.load(w_s.at[strip], layout=multiplier.left)
                a = lax.bitcast_convert_type(bits, x.dtype)
                sums = multiplier.add(sums, {0: a}, x_s.at[0, strip])
            _wait()
            return sums

        def step(s, carry):
            x_slot, w_slot, sums = carry
            for half in (0, 1):
                # Groups of the turns behind the one that began this turn's x.
                _wait(
                    sum(2 + 2 * ((half - t) % 2 == 0) for t in range(1, x_stages - 1))
                )
                if half == 0:
                    ahead = w_stages - 1
                    fetch_words(s + ahead, _after(w_slot, ahead, w_stages))
                ahead = x_stages - 1
                use = half + ahead
                fetch_x(s + use // 2, use % 2, _after(x_slot, ahead, x_stages))
                words = plgpu.load(w_s.at[w_slot], layout=multiplier.left)
                values = registers.decode_pair(
                    words,
                    half,
                    decoder=config.decoder,
                    codebook=codebook,
                    dtype=x.dtype,
                    layout=multiplier.left,
                    table=parts.get("table"),
                )
                for number, plane in enumerate(pairs[half]):
                    scale = plgpu.load(
                        s_s.at[w_slot, plane], layout=multiplier.left.reduce(1)
                    )
                    a = _scale(values[number], scale, 0, multiplier.left, x.dtype)
                    sums = multiplier.add(sums, {0: a}, x_s.at[x_slot, number])
                x_slot = _after(x_slot, 1, x_stages)
            return x_slot, _after(w_slot, 1, w_stages), sums

        sums = multiplier.zeros()
        if low_rank:
            extra = low_rank if splits == 1 else jnp.where(split == 0, low_rank, 0)
            sums = lax.fori_loop(0, extra, low_rank_step, sums)
        for turn in range(-2 * (w_stages - 1), 0):
            fetch_ahead(turn)
        slots = jnp.int32(0), jnp.int32(0)
        *_, sums = lax.fori_loop(0, steps, step, (*slots, sums))
        _wait()
        if splits > 1:
            multiplier.store(sums, 0, out_g.at[:, rows, tokens], split)
        else:
            multiplier.store(sums, 0, out_g.at[tokens, rows], None)

    scratch = {
        "x": plgpu.SMEM(
            (x_stages, 2, bm, depth), x.dtype, transforms=_swizzled(depth, bm)
        ),
        "words": plgpu.SMEM(
            (w_stages, bn, depth), jnp.uint16, transforms=_swizzled(depth)
        ),
        "scales": plgpu.SMEM((w_stages, 4, bn), scales.dtype),
    }
    return _launch(
        kernel,
        [x, codes, _by_tile(scales, bn), *_addend_operands(addend)],
        _out_type(m, n, x.dtype, config),
        scratch,
        splits * mi * ni,
        num_sms,
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

    A step, which is one turn, covers 64 of n. A tile is all or half of the planes of a
    group of words.

    Args:
      dy: bfloat16 or float16; m a multiple of config.block_m, n of 64 * config.split_k.
      codes, scales, addend, config, codebook, num_sms, interpret: As in `forward`.

    Returns:
      (m, k) in dy's dtype; with split_k > 1 float32 parts (split_k, k, m) to be summed.
    """
    m, n = dy.shape
    k = codes.shape[1] * 4
    bm, splits, stages = config.block_m, config.split_k, config.x_stages
    planes = config.rows // 64
    halves, shares = planes // 2, 4 // planes  # of a tile, of a group of words
    mi, ki, steps = m // bm, k // config.rows, n // 64 // splits
    low_rank = 0 if addend is None else addend[0].shape[1] // 64
    multiplier = _Multiplier(config, dy.dtype, planes, 64)
    assert 2 <= stages == config.weight_stages and planes in (2, 4), config

    def kernel(linear, dy_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_s, w_s, s_s = parts["x"], parts["words"], parts["scales"]
        split, i, j = _tile(linear, mi, ki, config)
        tokens = pl.ds(i * bm, bm)
        group, share = lax.div(j, jnp.int32(shares)), lax.rem(j, jnp.int32(shares))

        def plane(half, number):
            """Which plane the decoder gives for a half of the tile."""
            first, second = registers.plane_pair(config.decoder, half)
            shift = registers.plane_pair(config.decoder, 1)[0] if shares == 2 else 0
            return share * shift + (second if number else first)

        def columns(half, number):
            return pl.ds(group * 256 + plane(half, number) * 64, 64)

        def fetch(step, slot):
            step = split * steps + jnp.minimum(step, steps - 1)
            rows = pl.ds(step * 64, 64)
            _copy(w_g.at[rows, pl.ds(group * 64, 64)], w_s.at[slot])
            _copy(s_g.at[group, step], s_s.at[slot])
            _copy(dy_g.at[tokens, rows], x_s.at[slot])

        def low_rank_step(s, sums):
            ranks = pl.ds(s * 64, 64)
            _copy(uv[0].at[tokens, ranks], x_s.at[0])
            for half in range(halves):
                for number in (0, 1):
                    _copy(uv[1].at[columns(half, number), ranks], w_s.at[number])
                _wait()
                operands = {}
                for number in (0, 1):
                    bits = plgpu.load(w_s.at[number], layout=multiplier.left)
                    a = lax.bitcast_convert_type(bits, dy.dtype)
                    operands[2 * half + number] = a
                sums = multiplier.add(sums, operands, x_s.at[0])
                _wait()
            return sums

        def step(s, carry):
            slot, sums = carry
            _wait(3 * (stages - 2))
            fetch(s + stages - 1, _after(slot, stages - 1, stages))
            words = plgpu.load(w_s.at[slot].transpose((1, 0)), layout=multiplier.left)
            for half in range(halves):
                shift = share * registers.pair_shift(config.decoder)
                values = registers.decode_pair(
                    words,
                    half,
                    decoder=config.decoder,
                    codebook=codebook,
                    dtype=dy.dtype,
                    layout=multiplier.left,
                    table=parts.get("table"),
                    shift=shift if shares == 2 else None,
                )
                operands = {}
                for number in (0, 1):
                    scale = plgpu.load(
                        s_s.at[slot, plane(half, number)],
                        layout=multiplier.left.reduce(0),
                    )
                    operands[2 * half + number] = _scale(
                        values[number], scale, 1, multiplier.left, dy.dtype
                    )
                sums = multiplier.add(sums, operands, x_s.at[slot])
            return _after(slot, 1, stages), sums

        sums = multiplier.zeros()
        if low_rank:
            extra = low_rank if splits == 1 else jnp.where(split == 0, low_rank, 0)
            sums = lax.fori_loop(0, extra, low_rank_step, sums)
        for number in range(stages - 1):
            fetch(jnp.int32(number), number)
        _, sums = lax.fori_loop(0, steps, step, (jnp.int32(0), sums))
        _wait()
        for half in range(halves):
            for number in (0, 1):
                where = columns(half, number)
                if splits > 1:
                    out = out_g.at[:, where, tokens]
                    multiplier.store(sums, 2 * half + number, out, split)
                else:
                    out = out_g.at[tokens, where]
                    multiplier.store(sums, 2 * half + number, out, None)

    scratch = {
        "x": plgpu.SMEM((stages, bm, 64), dy.dtype, transforms=_swizzled(64, bm)),
        "words": plgpu.SMEM((stages, 64, 64), jnp.uint16, transforms=_swizzled(64)),
        "scales": plgpu.SMEM((stages, 4, 64), scales.dtype),
    }
    return _launch(
        kernel,
        [dy, codes, _by_tile(scales, 64), *_addend_operands(addend)],
        _out_type(m, k, dy.dtype, config),
        scratch,
        splits * mi * ki,
        num_sms,
        config,
        codebook,
        interpret,
    )


def _swizzled(columns: int, rows: int = 64) -> tuple[Any, ...]:
    """How 16-bit tiles lie in shared memory, for loads without bank conflicts.

    Each warp copies some of the pieces of 8 rows: there must be four or more.
    """
    columns //= max(1, 32 // rows)
    return (
        _transforms.TilingTransform((8, columns)),
        _transforms.SwizzleTransform(2 * columns),
    )


def _by_tile(scales: Array, width: int) -> Array:
    """Reorders scales (k/64, n) to (k/256, n/width, 4, width).

    A copy of scales is linear: those of a tile of rows and a group of words must be one
    behind the other.
    """
    blocks, n = scales.shape
    return scales.reshape(blocks // 4, 4, n // width, width).transpose(0, 2, 1, 3)


def _addend_operands(addend: tuple[Array, Array] | None) -> list[Array]:
    if addend is None:
        return []
    u, v = addend
    return [u, lax.bitcast_convert_type(v, jnp.uint16)]  # v in the words' buffers


def _out_type(
    m: int, columns: int, dtype: jnp.dtype, config: Config
) -> jax.ShapeDtypeStruct:
    if config.split_k == 1:
        return jax.ShapeDtypeStruct((m, columns), dtype)
    return jax.ShapeDtypeStruct((config.split_k, columns, m), jnp.float32)
