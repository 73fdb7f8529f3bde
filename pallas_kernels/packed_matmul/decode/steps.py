"""The steps of the decode kernel: what a warpgroup loads, multiplies, adds up and stores.

Each is inline code (warp.py) or, in the interpreter, the same in plain
jax.numpy (plain.py).
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa

from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul.decode import plain, warp

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
SUMS = plgpu.Layout.WGMMA
_SPLAT = plgpu.Layout.WG_SPLAT(())


class Steps:
    """The steps for one product, whose shapes forward._Kernel sets.

    Attributes:
      m, n, k: The sizes of the product: x (m, k), w (n, k), result (m, n).
      dtype: The dtype of x.
      config: A config.Config.
      interpret: Whether the interpreter runs it.
      double_quant: Whether absmax comes in 8 bits.
      groups: Word groups (of 256 weights along k) that a block sees.
      tokens: m rounded up to whole token blocks of 8.
      token_blocks, row_tiles: Blocks of 8 tokens, and of 16 rows, in a tile.
      x_width: Columns of x in shared memory.
    """

    m: int
    n: int
    k: int
    dtype: Any
    config: Any
    interpret: Any
    double_quant: bool
    groups: int
    tokens: int
    token_blocks: int
    row_tiles: int
    x_width: int

    def add_up(self, source, out_g, row):
        """Adds up sums of several parts and writes them to columns of out."""
        if self.interpret:
            plain.write(self, plain.totals(source[...]), out_g, row)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT))
        def run(ctx, *args):
            del ctx
            sums, out, row = args
            totals = warp.totals(source.shape, sums)
            warp.write(self, totals, out, row.registers.item())

        run(source, out_g, row)

    def send(self, source, target):
        """Adds up sums of a team into `target` (row tiles, token blocks, 16, 8)."""
        if self.interpret:
            target[...] = plain.totals(source[...])
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def run(ctx, *args):
            del ctx
            sums, target = args
            totals = warp.totals(source.shape, sums)
            warp.send(totals, target)

        run(source, target)

    def load(self, w_g, absmax_g, row, group):
        """Starts the loads of a tile: words, absmax (codes), and absmax_scale if any."""
        absmax_g = absmax_g[:2]  # the third is the offset
        if self.interpret:
            return plain.load_tile(self, (w_g, *absmax_g), row, group)
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
            loaded = warp.load_tile(
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
        def run(ctx, *args):
            del ctx
            source, target, wg = args
            warp.fill_table(source, target, wg.registers.item(), wgs)

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
            return plain.load_x(self, x_g, group * 256)
        shape = (self.tokens, 256 * GROUPS)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _SPLAT),
            return_type=plgpu.ShapeDtypeStruct(shape, self.dtype, layout=_X),
        )
        def run(ctx, *args):
            del ctx
            x, group = args
            values = warp.load_x(self, x, group.registers.item())
            return _array(values, _X.to_mgpu(), shape)

        return run(x_g, group)

    def keep(self, sums, target, add=None):
        """Stores a warpgroup's sums in `target`, adding to it where `add` holds."""
        if self.interpret:
            for number, part in enumerate(sums):
                own = target.at[divmod(number, self.token_blocks)]
                if add is not None:
                    part = part + jnp.where(add, own[...], jnp.float32(0))
                own[...] = part
            return
        flag = () if add is None else (add.astype(jnp.int32),)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[SUMS] * len(sums), *[_SPLAT] * len(flag))
        )
        def run(ctx, *args):
            del ctx
            target, *fragments = args
            fragments, add = fragments[: len(sums)], fragments[len(sums) :]
            warp.keep(target, fragments, *add)

        run(target, *sums, *flag)

    def multiply(self, tile, x, table, skip, offset, sums):
        """Adds the tile's products to sums.

        They are (64, 8), of 16 rows and 8 tokens, token blocks minor: row 16q+r is what
        warp q has for row r.
        """
        held, x_s, group = x
        if self.interpret:
            if held is None:
                held = plain.load_x(self, x_s, group * 256)
            return plain.multiply(self, tile, held, table, skip, offset, sums)
        words, absmax, *factor = tile
        x, x_type = (x_s, plgpu.RefType()) if held is None else (held, _X)
        args = [words, absmax, x, table, group, skip, offset, *sums]
        types = [_WORDS, _ABSMAX, x_type, plgpu.RefType(), *[_SPLAT] * 3]
        structs = [plgpu.ShapeDtypeStruct((64, 8), jnp.dtype(jnp.float32), layout=SUMS)]

        @plgpu.inline_mgpu(
            arg_types=(*types, *[SUMS] * len(sums), *[_FACTOR] * len(factor)),
            return_type=tuple(structs * len(sums)),
        )
        def run(ctx, *args):
            del ctx
            product = warp.Product(self, *args)
            return tuple(_array(v, SUMS.to_mgpu(), (64, 8)) for v in product())

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
