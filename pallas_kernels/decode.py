"""The NF4 product for few tokens (generation): bound by reading the weight once.

y = x @ W.T for m <= 32, in one launch. As many blocks as SMs each hold x, or a part of its
columns, in shared memory and walk over tiles of 16 or more rows of W. A team of
warpgroups works on a tile, its warps splitting k; a block has one or more teams, and the
blocks of a cluster split k as well, for x that is too large for one of them. Words go
from memory to registers, a tile or more ahead; absmax is decoded from its 8 bits on the
way. Sums of a tile meet in shared memory, of a cluster in that of its first block.

What a warp does with a tile in registers is in decode_registers.py.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa

from pallas_kernels import codebook as cb
from pallas_kernels import decode_plain, decode_registers, reference
from pallas_kernels.annotations import Array, Float
from pallas_kernels.layout import QuantizedTensor

GROUPS = 4
"""Word groups (of 64 words, 256 weights) that a warpgroup takes at once, one a warp."""


def _tiled(tiles, warps, lanes):
    return plgpu.Layout.TILED(fa.Tiling(tiles), warps, lanes, -1)


# Lane 4g+t of warp q holds of group q the words 8t to 8t+7 and 32+8t to 32+8t+7 of rows
# g and g+8; the absmax (codes) of those rows and planes; of x, token g at those words of
# each plane; of the sums, tokens 2t and 2t+1.
_WORDS = _tiled(((16, 256), (16, 64), (8, 32), (8,)), (-6,), (-3, -2))
_ABSMAX = _tiled(((16, 16), (16, 4), (8, 4)), (-5,), (-2, fa.Replicated(4)))
_FACTOR = _tiled(((16, 4), (16, 1), (8, 1)), (-5,), (-2, fa.Replicated(4)))
_X = _tiled(((8, 1024), (8, 256), (8, 32), (8,)), (-6,), (-3, -2))
_SUMS = plgpu.Layout.WGMMA
_SPLAT = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is cut; all of it static.

    Attributes:
      teams: Tiles that a block has in work at a time.
      team: Warpgroups that share a tile; its 4 * team warps split k. A power of two.
      splits: Blocks of a cluster, which split k (and so x) once more.
      batch: Tiles whose sums a team keeps in shared memory until it adds them up; 1 with
        splits.
      rows: Rows of W in a tile, a multiple of 16.
      ahead: Tiles that a warpgroup loads ahead of the one that it multiplies.
      hold_x: Whether a warp keeps its part of x in registers, 32 for 8 tokens, rather
        than in shared memory; where a team's share of k is one step.
    """

    teams: int = 1
    team: int = 4
    splits: int = 1
    batch: int = 1
    rows: int = 16
    ahead: int = 1
    hold_x: bool = False


def forward(
    x: Float[Array, "m k"],
    w: QuantizedTensor,
    *,
    config: Config,
    num_sms: int,
    interpret: Any = False,
) -> Float[Array, "m n"]:
    """Computes x @ W.T.

    Values are the codebook rounded to x's dtype; absmax and all sums are float32.

    Args:
      x: bfloat16 or float16, (m, k).
      w: A weight (n, k) in the planar256 layout; n a multiple of config.rows.
      config: How it is cut.
      num_sms: Streaming multiprocessors of the device.
      interpret: False, or plgpu.InterpretGPUParams to run on a CPU; then what a warp
        does in registers is plain jax.numpy, all else is the same.

    Returns:
      (m, n) in x's dtype.

    Raises:
      ValueError: the shapes cannot be cut so.
    """
    n, k = w.shape
    codes, absmax = w.codes, _absmax_operands(w)
    short = 256 * GROUPS * config.splits - k
    if short > 0:  # a tiny weight; absmax 0 adds nothing
        plain = jnp.repeat(reference.decode_absmax(w), w.block_size // 64)
        absmax = [jnp.pad(plain.reshape(n, -1), ((0, 0), (0, short // 64)))]
        codes = jnp.pad(codes, ((0, 0), (0, short // 4)))
        x = jnp.pad(x, ((0, 0), (0, short)))
    kernel = _Kernel(x, n, w, config, len(absmax) > 1, num_sms, interpret)
    return kernel(x, codes, *absmax)


def _absmax_operands(w: QuantizedTensor) -> list[Array]:
    """Absmax of every 64 elements, (n, k/64): codes, scale and offset, or float32."""
    n = w.shape[0]
    stored = w.absmax_codes if w.double_quant else w.absmax
    if w.block_size > 64:
        stored = jnp.repeat(stored, w.block_size // 64)
    if not w.double_quant:
        return [stored.reshape(n, -1)]
    return [stored.reshape(n, -1), w.absmax_scale, w.absmax_offset.reshape(1)]


class _Kernel:
    """The kernel for one product's shapes."""

    def __init__(self, x, n, w, config, double_quant, num_sms, interpret):
        self.m, self.k = x.shape
        self.n, self.dtype = n, jnp.dtype(x.dtype)
        self.config, self.interpret = config, interpret
        self.codebook, self.double_quant = w.codebook, double_quant
        self.scale_blocks = cb.ABSMAX_BLOCK_SIZE * (w.block_size // 64)
        self.tokens = -(-self.m // 8) * 8
        self.row_tiles, self.token_blocks = config.rows // 16, self.tokens // 8
        self.all_groups = self.k // 256
        self.groups = -(-self.all_groups // config.splits)  # of a block
        last = self.all_groups - (config.splits - 1) * self.groups
        self.steps = -(-self.groups // (GROUPS * config.team))
        self.ragged = last * config.splits != self.steps * GROUPS * config.team * (
            config.splits
        )
        self.tiles = n // config.rows
        slots = num_sms // config.splits * config.teams
        most = -(-self.tiles // slots)  # tiles of a team
        # No more clusters than that takes: not every SM can be in a cluster of 4.
        self.clusters = -(-self.tiles // (most * config.teams))
        if config.splits == 1:
            self.clusters = min(num_sms, -(-self.tiles // config.teams))
        held = not config.hold_x or self.steps == 1
        alone = config.batch == 1 or config.splits == 1
        if self.k % 256 or n % config.rows or last < GROUPS or not (held and alone):
            raise ValueError(f"{config} cannot cut n={n}, k={self.k}")

    def __call__(self, x: Array, codes: Array, *absmax: Array) -> Array:
        config = self.config
        out = jax.ShapeDtypeStruct((self.m, self.n), self.dtype)
        tile = (self.row_tiles, self.token_blocks)
        gathered = (2, config.teams, config.splits, *tile, 16, 8)
        scratch = {
            "x": plgpu.SMEM((self.m, self.x_width), self.dtype),
            "table": plgpu.SMEM((256, 64), jnp.uint32),
            "sums": plgpu.SMEM(
                (config.batch, config.teams, config.team, *tile, 64, 8),
                jnp.float32,
            ),
            "ready": plgpu.Barrier(num_arrivals=config.teams * config.team),
            "summed": plgpu.Barrier(
                num_arrivals=config.team, num_barriers=config.teams
            ),
        }
        if config.hold_x:
            del scratch["x"]
        options = {}
        if config.splits > 1:
            options = {"cluster": (config.splits,), "cluster_names": ("split",)}
            scratch["gathered"] = plgpu.SMEM(gathered, jnp.float32)
            scratch["sent"] = plgpu.ClusterBarrier(
                collective_axes=("split",), num_barriers=config.teams
            )
            if self.interpret:  # has no memory of a cluster; what it holds goes by HBM
                del scratch["gathered"]
                out = (
                    out,
                    jax.ShapeDtypeStruct((self.clusters, *gathered), jnp.float32),
                )
        result = plgpu.kernel(
            self.body,
            out_type=out,
            grid=(self.clusters,),
            grid_names=("cluster",),
            num_threads=config.teams * config.team,
            thread_name="wg",
            scratch_types=(scratch,),
            interpret=self.interpret,
            **options,
        )(x, codes, jnp.asarray(table_rows(self.codebook, self.dtype)), *absmax)
        return result[0] if isinstance(result, (tuple, list)) else result

    @property
    def x_width(self) -> int:
        """Columns of x in shared memory: padded, so that rows g, g+1 differ in bank."""
        return self.groups * 256 + 32

    def body(self, x_g, w_g, table_g, *refs):
        """The kernel, in every warpgroup."""
        config = self.config
        count = 3 if self.double_quant else 1
        absmax_g, (out_g, *rest) = refs[:count], refs[count:]
        parts = rest[-1]
        cluster = lax.axis_index("cluster")
        split = lax.axis_index("split") if config.splits > 1 else jnp.int32(0)
        if config.splits > 1 and self.interpret:
            parts["gathered"] = rest[0].at[cluster]
        wg = lax.axis_index("wg")
        team, member = lax.div(wg, config.team), lax.rem(wg, config.team)
        stride = self.clusters * config.teams
        first = cluster * config.teams + team
        tiles = lax.div(self.tiles - first + stride - 1, jnp.int32(stride))
        group_0 = split * self.groups

        def row_of(tile):
            return (first + tile * stride) * config.rows

        def place(item):
            """Row, group and the number of its warps to leave out, of an item."""
            tile, step = item, jnp.int32(0)
            if self.steps > 1:
                tile = lax.div(item, jnp.int32(self.steps))
                step = lax.rem(item, jnp.int32(self.steps))
            row = jnp.minimum(row_of(tile), self.n - config.rows)
            group = group_0 + (step * config.team + member) * GROUPS
            if not self.ragged:
                return row, group, jnp.int32(0)
            end = jnp.minimum(group_0 + self.groups, self.all_groups)
            inside = jnp.minimum(group, end - GROUPS)
            return row, inside, group - inside

        def load(item):
            row, group, _ = place(item)
            return self.load(w_g, absmax_g, row, group)

        # The loads of words are on their way while the table is filled.
        held = self.hold_x(x_g, place(jnp.int32(0))[1]) if config.hold_x else None
        ahead = tuple(load(jnp.int32(i)) for i in range(config.ahead))
        offset = absmax_g[2][0] if self.double_quant else jnp.float32(0)
        if held is None:
            self.fill_x(x_g, parts["x"], wg, group_0 * 256)
        self.fill_table(table_g, parts["table"], wg)
        plgpu.barrier_arrive(parts["ready"])
        plgpu.barrier_wait(parts["ready"])

        def tile_body(tile, ahead):
            def step_body(step, carry):
                ahead, sums = carry
                item = tile * self.steps + step
                coming = load(item + config.ahead)
                _, group, skip = place(item)
                sums = self.multiply(
                    ahead[0], held, parts, group - group_0, skip, offset, sums
                )
                return (*ahead[1:], coming), sums

            zero = plgpu.layout_cast(jnp.zeros((64, 8), jnp.float32), _SUMS)
            carry = (ahead, (zero,) * (self.row_tiles * self.token_blocks))
            if self.steps == 1:
                carry = step_body(jnp.int32(0), carry)
            else:
                carry = lax.fori_loop(0, self.steps, step_body, carry)
            ahead, sums = carry
            slot = lax.rem(tile, jnp.int32(config.batch))
            for number, part in enumerate(sums):
                i, j = divmod(number, self.token_blocks)
                parts["sums"].at[slot, team, member, i, j][...] = part
            return ahead

        def meet():
            if config.team > 1:
                plgpu.barrier_arrive(parts["summed"].at[team])
                plgpu.barrier_wait(parts["summed"].at[team])

        def batch_body(number, ahead):
            start = number * config.batch
            end = jnp.minimum(start + config.batch, tiles)
            ahead = lax.fori_loop(start, end, tile_body, ahead)
            if config.splits > 1:
                # Before they meet: none may be two phases behind in `sent`.
                pl.when(start > 0)(lambda: plgpu.barrier_wait(parts["sent"].at[team]))
            meet()
            if config.splits == 1:

                @pl.loop(start + member, end, step=config.team)
                def _(tile):
                    sums = parts["sums"].at[tile - start, team]
                    self.add_up(sums, out_g, row_of(tile))

            else:
                mine = lax.rem(start, config.team) == member
                pl.when(mine)(
                    lambda: self.exchange(start, parts, team, split, row_of, out_g)
                )
            if batches > 1:
                meet()  # the sums may be overwritten
            return ahead

        most = -(-self.tiles // stride)
        batches = -(-most // config.batch)
        if batches == 1:
            batch_body(jnp.int32(0), ahead)
        else:
            count = lax.div(tiles + config.batch - 1, jnp.int32(config.batch))
            lax.fori_loop(0, count, batch_body, ahead)
        if config.splits > 1:

            @pl.when(tiles > 0)
            def _():
                plgpu.barrier_wait(parts["sent"].at[team])
                pl.when((split == 0) & (member == 0))(
                    lambda: self.collect(tiles - 1, parts, team, row_of, out_g)
                )

    def exchange(self, tile, parts, team, split, row_of, out_g):
        """Adds up the sums of a team's warps and sends them to split 0.

        Split 0 collects a tile when the next is sent. It arrives for a tile behind
        collecting the one before, so a sender that has waited for it may overwrite that.
        """
        pl.when((tile > 0) & (split == 0))(
            lambda: self.collect(tile - 1, parts, team, row_of, out_g)
        )
        target = parts["gathered"].at[lax.rem(tile, 2), team, split]
        self.send(parts["sums"].at[0, team], target)
        plgpu.barrier_arrive(parts["sent"].at[team])

    def collect(self, tile, parts, team, row_of, out_g):
        """Adds up a tile's sums of all splits and writes them."""
        source = parts["gathered"].at[lax.rem(tile, 2), team]
        self.add_up(source, out_g, row_of(tile))

    def add_up(self, source, out_g, row):
        """Adds up sums of several parts and writes them to columns of out."""
        if self.interpret:
            decode_plain.write(self, decode_plain.totals(source[...]), out_g, row)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT))
        def run(ctx, sums, out, row):
            del ctx
            totals = decode_registers.totals(source.shape, sums)
            decode_registers.write(self, totals, out, row.registers.item())

        run(source, out_g, row)

    def send(self, source, target):
        """Adds up sums of a team into `target` (row tiles, token blocks, 16, 8)."""
        if self.interpret:
            target[...] = decode_plain.totals(source[...])
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def run(ctx, sums, target):
            del ctx
            totals = decode_registers.totals(source.shape, sums)
            decode_registers.send(totals, target)

        run(source, target)

    def load(self, w_g, absmax_g, row, group):
        """Starts the loads of a tile: words, absmax (codes), and absmax_scale if any."""
        absmax_g = absmax_g[:2]  # the third is the offset
        if self.interpret:
            return decode_plain.load_tile(self, (w_g, *absmax_g), row, group)
        layouts = (_WORDS, _ABSMAX, _FACTOR)
        types = [
            plgpu.ShapeDtypeStruct(
                (self.config.rows, width * GROUPS), ref.dtype, layout=layout
            )
            for width, ref, layout in zip(
                (64, 4, 1), (w_g, *absmax_g), layouts, strict=False
            )
        ]
        refs = (plgpu.RefType(),) * len(types)

        @plgpu.inline_mgpu(arg_types=(*refs, _SPLAT, _SPLAT), return_type=tuple(types))
        def run(ctx, *args):
            del ctx
            *refs, row, group = args
            loaded = decode_registers.load_tile(
                self, refs, row.registers.item(), group.registers.item()
            )
            return tuple(
                _array(
                    values,
                    t.layout.to_mgpu(),
                    t.shape,
                    None if t.dtype == jnp.float32 else False,
                )
                for values, t in zip(loaded, types, strict=True)
            )

        return run(w_g, *absmax_g, row, group)

    def fill_table(self, table_g, table_s, wg):
        """Copies each of the 2 * 256 values to 32 lanes, rows shared out to warps."""
        wgs = self.config.teams * self.config.team
        if self.interpret:

            @pl.when(wg == 0)
            def _():
                table_s[...] = jnp.repeat(table_g[...].T, 32, axis=1)

            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT))
        def run(ctx, source, target, wg):
            del ctx
            decode_registers.fill_table(source, target, wg.registers.item(), wgs)

        run(table_g, table_s, wg)

    def fill_x(self, x_g, x_s, wg, column_0):
        """Copies a split's columns of x, in chunks shared out to warpgroups."""
        wgs = self.config.teams * self.config.team
        width = self.groups * 256
        chunk = next(c for c in (1024, 512, 256) if not (width % c or self.k % c))
        layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // 128)
        chunks = self.m * (width // chunk)

        def copy(start, stop):
            """Copies chunks start + wg, start + wg + wgs, ... below stop."""
            places, values = [], []
            for number in range(start, stop, wgs):
                at = number + wg
                token = lax.div(at, jnp.int32(width // chunk))
                column = lax.rem(at, jnp.int32(width // chunk)) * chunk
                # Behind the last split's columns nothing is read: any will do.
                source = jnp.minimum(column_0 + column, self.k - chunk)
                source = x_g.at[token, pl.ds(source, chunk)]
                values.append(plgpu.load(source, layout=layout, optimized=False))
                places.append((token, pl.ds(column, chunk)))
            for place, value in zip(places, values, strict=True):
                x_s.at[*place][...] = value

        whole = chunks // wgs * wgs  # behind it not every warpgroup has a chunk
        for start in range(0, whole, 8 * wgs):  # 8 in flight
            copy(start, min(start + 8 * wgs, whole))
        if whole < chunks:
            pl.when(wg < chunks - whole)(lambda: copy(whole, whole + 1))

    def hold_x(self, x_g, group):
        """Loads what the warps of a warpgroup need of x, (tokens, 1024), from `group`.

        Tokens behind the last are copies of it; what is computed for them is not stored.
        """
        if self.interpret:
            return decode_plain.load_x(self, x_g, group * 256)
        shape = (self.tokens, 256 * GROUPS)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _SPLAT),
            return_type=plgpu.ShapeDtypeStruct(shape, self.dtype, layout=_X),
        )
        def run(ctx, x, group):
            del ctx
            values = decode_registers.load_x(self, x, group.registers.item())
            return _array(values, _X.to_mgpu(), shape)

        return run(x_g, group)

    def multiply(self, tile, held, parts, group, skip, offset, sums):
        """Adds the tile's products to sums.

        They are (64, 8), of 16 rows and 8 tokens, token blocks minor: row 16q+r is what
        warp q has for row r.
        """
        if self.interpret:
            x, table = held, parts["table"]
            if held is None:
                x = decode_plain.load_x(self, parts["x"], group * 256)
            return decode_plain.multiply(self, tile, x, table, skip, offset, sums)
        words, absmax, *factor = tile
        x, x_type = parts.get("x"), plgpu.RefType()
        if held is not None:
            x, x_type = held, _X
        args = [words, absmax, x, parts["table"], group, skip, offset, *sums]
        types = [_WORDS, _ABSMAX, x_type, plgpu.RefType(), *[_SPLAT] * 3]
        structs = [plgpu.ShapeDtypeStruct((64, 8), jnp.float32, layout=_SUMS)]

        @plgpu.inline_mgpu(
            arg_types=(*types, *[_SUMS] * len(sums), *[_FACTOR] * len(factor)),
            return_type=tuple(structs * len(sums)),
        )
        def run(ctx, *args):
            del ctx
            product = decode_registers.Product(self, *args)
            return tuple(_array(v, _SUMS.to_mgpu(), (64, 8)) for v in product())

        return run(*args, *factor)


def _array(values, layout, shape, is_signed=None) -> fa.FragmentedArray:
    """An array of these registers; is_signed of integers, else None."""
    out = np.empty(len(values), object)
    for i, value in enumerate(values):
        out[i] = value
    return fa.FragmentedArray(
        _registers=out.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=is_signed,
    )


def table_rows(codebook: cb.Codebook, dtype: jnp.dtype) -> np.ndarray:
    """Returns what fills the table: uint32 (2, 256), each for 32 lanes.

    Row `code e | code e+1 << 4` of the first half has the pair in 16 bits; row r of the
    second has value r of the dynamic map, float32 bits.
    """
    bits = cb.values(codebook).astype(dtype).view(np.uint16).astype(np.uint32)
    low, high = np.meshgrid(np.arange(16), np.arange(16))
    pairs = (bits[low] | bits[high] << 16).reshape(256)
    return np.stack([pairs, cb.dynamic_map().view(np.uint32)])
