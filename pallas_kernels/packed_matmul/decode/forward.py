"""The kernel of 'decode': y = x @ W.T for few tokens, bound by reading the weight once.

It takes m <= 32, in one launch. As many blocks as SMs walk over tiles of 16 or
more rows of W. A team of warpgroups works on a tile, its warps splitting k: a tile is
small, and all SMs get the same share. Words go from memory to registers, a tile or more
ahead; absmax is decoded from its 8 bits on the way. x is in registers, each warp having
what it needs of it (m <= 8: shared memory is then left to the decoding), or in shared
memory; for x too large for that the blocks of a cluster split k once more. The sums of a
tile's warps meet in shared memory, those of a cluster in that of its first block.

This file has the way through the tiles; what is done with one is in steps.py.

Measured on an H200: the kernel is bound by shared memory and L1, where each pair of weights
costs a look-up, not by HBM; so it pays to keep x, and barriers, out of the main loop.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array, Float
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul.decode.config import Config
from pallas_kernels.packed_matmul.decode.steps import GROUPS, SUMS, Steps, table_rows


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
      config: The kernel's tiling: how rows and k are divided among blocks and warps.
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
        plain = jnp.repeat(w.decode_absmax(), w.block_size // 64, axis=1)
        absmax = [jnp.pad(plain, ((0, 0), (0, short // 64)))]
        codes = jnp.pad(codes, ((0, 0), (0, short // 4)))
        x = jnp.pad(x, ((0, 0), (0, short)))
    kernel = _Kernel(x, n, w, config, len(absmax) > 1, num_sms, interpret)
    return kernel(x, codes, *absmax)


def _absmax_operands(w: QuantizedTensor) -> list[Array]:
    """Absmax of every 64 elements, (n, k/64): codes, scale and offset, or float32."""
    stored = w.absmax_codes if w.double_quant else w.absmax
    assert stored is not None
    if w.block_size > 64:
        stored = jnp.repeat(stored, w.block_size // 64, axis=1)
    if not w.double_quant:
        return [stored]
    assert w.absmax_scale is not None and w.absmax_offset is not None
    return [stored, w.absmax_scale, w.absmax_offset.reshape(1)]


class _Kernel(Steps):
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
        # Padded, so that rows g and g + 1 lie in different banks.
        self.x_width = self.groups * 256 + 32
        last = self.all_groups - (config.splits - 1) * self.groups
        self.steps = -(-self.groups // (GROUPS * config.team))
        # Whether some step of some split has no group for some warps.
        self.ragged = not last == self.groups == self.steps * GROUPS * config.team
        self.tiles = n // config.rows
        slots = num_sms // config.splits * config.teams
        most = -(-self.tiles // slots)  # tiles of a team
        self.batches = -(-most // config.batch)
        # Steps that all tiles take before the next, with x held in registers.
        self.turns = self.steps if config.hold_x else 1
        # No more clusters than that takes: not every SM can be in a cluster of 4.
        self.clusters = -(-self.tiles // (most * config.teams))
        if config.splits == 1:
            self.clusters = min(num_sms, -(-self.tiles // config.teams))
        held = self.turns == 1 or config.ahead == 1
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
        )(
            x,
            codes,
            jnp.asarray(table_rows(self.codebook, self.dtype)),
            *absmax,
        )
        return result[0] if isinstance(result, (tuple, list)) else result

    def body(self, x_g, w_g, table_g, *refs):
        """The kernel, in every warpgroup."""
        count = 3 if self.double_quant else 1
        absmax_g, (out_g, *rest, parts) = refs[:count], refs[count:]
        if rest:  # the interpreter's
            parts["gathered"] = rest[0].at[lax.axis_index("cluster")]
        _Warpgroup(self, x_g, w_g, table_g, absmax_g, out_g, parts).run()


class _Warpgroup:
    """A warpgroup's way through the tiles of its team; made while tracing the kernel.

    A team's tiles are numbered from 0. `ahead` are the loaded tiles that come next.
    """

    def __init__(self, kernel, x_g, w_g, table_g, absmax_g, out_g, parts):
        self.kernel, self.config = kernel, kernel.config
        self.x_g, self.w_g, self.table_g, self.absmax_g = x_g, w_g, table_g, absmax_g
        self.out_g, self.parts = out_g, parts
        splits, teams, team = self.config.splits, self.config.teams, self.config.team
        self.wg = lax.axis_index("wg")
        self.split = lax.axis_index("split") if splits > 1 else jnp.int32(0)
        self.team, self.member = lax.div(self.wg, team), lax.rem(self.wg, team)
        self.first = lax.axis_index("cluster") * teams + self.team
        self.stride = stride = kernel.clusters * teams
        self.tiles = lax.div(kernel.tiles - self.first + stride - 1, jnp.int32(stride))
        self.group_0 = self.split * kernel.groups
        zero = plgpu.layout_cast(jnp.zeros((64, 8), jnp.float32), SUMS)
        self.zeros = (zero,) * (kernel.row_tiles * kernel.token_blocks)

    def run(self):
        """Multiplies all tiles."""
        kernel, config = self.kernel, self.config
        # The loads of words are on their way while the table is filled.
        start, held = jnp.int32(0), None
        if config.hold_x:
            held = kernel.hold_x(self.x_g, self.place(start, start)[1])
        ahead = tuple(
            self.load(*self.split_item(jnp.int32(i))) for i in range(config.ahead)
        )
        double = kernel.double_quant
        self.offset = self.absmax_g[2][0] if double else jnp.float32(0)
        if not config.hold_x:
            kernel.fill_x(self.x_g, self.parts["x"], self.wg, self.group_0 * 256)
        kernel.fill_table(self.table_g, self.parts["table"], self.wg)
        plgpu.barrier_arrive(self.parts["ready"])
        plgpu.barrier_wait(self.parts["ready"])

        self.held = held if kernel.turns == 1 else None
        carry = ahead if kernel.turns == 1 else (ahead, held)
        if kernel.batches == 1:
            self.batch(start, carry)
        else:
            count = lax.div(self.tiles + config.batch - 1, jnp.int32(config.batch))
            lax.fori_loop(0, count, self.batch, carry)
        if config.splits > 1:
            pl.when(self.tiles > 0)(self.collect_last)

    def row_of(self, tile):
        """First row of a tile."""
        return (self.first + tile * self.stride) * self.config.rows

    def place(self, tile, step):
        """Row and group of a tile's step, and how many warps to leave out of it.

        Behind the last tile and step that of another, which does no harm.
        """
        kernel = self.kernel
        row = jnp.minimum(self.row_of(tile), kernel.n - self.config.rows)
        group = self.group_0 + (step * self.config.team + self.member) * GROUPS
        if not kernel.ragged:
            return row, group, jnp.int32(0)
        end = jnp.minimum(self.group_0 + kernel.groups, kernel.all_groups)
        inside = jnp.minimum(group, end - GROUPS)
        return row, inside, group - inside

    def load(self, tile, step):
        """Starts the loads of a tile's step."""
        row, group, _ = self.place(tile, step)
        return self.kernel.load(self.w_g, self.absmax_g, row, group)

    def split_item(self, item):
        """Tile and step of the item-th load, where a tile's steps follow each other."""
        if self.kernel.steps == 1 or self.kernel.turns > 1:
            return item, jnp.int32(0)
        steps = jnp.int32(self.kernel.steps)
        return lax.div(item, steps), lax.rem(item, steps)

    def multiply(self, here, later, held, ahead, sums):
        """Multiplies a (tile, step), loading a later one; returns (ahead, sums)."""
        coming = self.load(*later)
        _, group, skip = self.place(*here)
        x = held, self.parts.get("x"), group - self.group_0
        sums = self.kernel.multiply(
            ahead[0], x, self.parts["table"], skip, self.offset, sums
        )
        return (*ahead[1:], coming), sums

    def tile(self, tile, start, ahead):
        """Multiplies all steps of a tile, in the batch that starts at `start`."""

        def item_body(item, carry):
            later = self.split_item(item + self.config.ahead)
            return self.multiply(self.split_item(item), later, self.held, *carry)

        steps = self.kernel.steps
        if steps == 1:
            ahead, sums = item_body(tile, (ahead, self.zeros))
        else:
            ahead, sums = lax.fori_loop(
                tile * steps, (tile + 1) * steps, item_body, (ahead, self.zeros)
            )
        self.kernel.keep(sums, self.sums_at(tile - start).at[self.member])
        return ahead

    def turn(self, turn, start, end, ahead, held):
        """Multiplies the same step of all tiles of a batch, with x held for it."""
        last = turn + 1 == self.kernel.turns
        following = lax.select(last, jnp.int32(0), turn + 1)
        # Behind the last tile is the first of the next turn, or of the next batch.
        begin = lax.select(last, end, start)

        def tile_body(tile, ahead):
            same = tile + 1 < end
            later = (
                lax.select(same, tile + 1, begin),
                lax.select(same, turn, following),
            )
            ahead, sums = self.multiply((tile, turn), later, held, ahead, self.zeros)
            target = self.sums_at(tile - start).at[self.member]
            self.kernel.keep(sums, target, turn > 0)
            return ahead

        ahead = lax.fori_loop(start, end, tile_body, ahead)
        return ahead, self.kernel.hold_x(self.x_g, self.place(start, following)[1])

    def batch(self, number, carry):
        """Multiplies a batch of tiles and adds up the sums of the team's warps."""
        config, turns = self.config, self.kernel.turns
        start = number * config.batch
        end = jnp.minimum(start + config.batch, self.tiles)
        if turns > 1:
            carry = lax.fori_loop(
                0, turns, lambda i, carry: self.turn(i, start, end, *carry), carry
            )
        else:
            carry = lax.fori_loop(
                start, end, lambda tile, ahead: self.tile(tile, start, ahead), carry
            )
        if config.splits > 1:
            # Before they meet: none may be two phases behind in `sent`.
            sent = self.parts["sent"].at[self.team]
            pl.when(start > 0)(lambda: plgpu.barrier_wait(sent))
        self.meet()
        if config.splits > 1:
            mine = lax.rem(start, config.team) == self.member
            pl.when(mine)(lambda: self.exchange(start))
        else:

            @pl.loop(start + self.member, end, step=config.team)
            def _(tile):
                self.kernel.add_up(
                    self.sums_at(tile - start), self.out_g, self.row_of(tile)
                )

        if self.kernel.batches > 1:
            self.meet()  # the sums may be overwritten
        return carry

    def sums_at(self, slot):
        """The sums of the team's warpgroups for a tile of the batch."""
        return self.parts["sums"].at[slot, self.team]

    def meet(self):
        """Waits for the team."""
        plgpu.barrier_arrive(self.parts["summed"].at[self.team])
        plgpu.barrier_wait(self.parts["summed"].at[self.team])

    def exchange(self, tile):
        """Adds up the sums of the team's warps and sends them to split 0.

        Split 0 collects a tile when the next is sent. It arrives for a tile behind
        collecting the one before, so a sender that has waited for it may overwrite that.
        """
        pl.when((tile > 0) & (self.split == 0))(lambda: self.collect(tile - 1))
        target = self.gathered_at(tile).at[self.split]
        self.kernel.send(self.sums_at(0), target)
        plgpu.barrier_arrive(self.parts["sent"].at[self.team])

    def collect(self, tile):
        """Adds up a tile's sums of all splits and writes them."""
        source = self.gathered_at(tile)
        self.kernel.add_up(source, self.out_g, self.row_of(tile))

    def collect_last(self):
        """Waits for what is on its way, and collects it."""
        plgpu.barrier_wait(self.parts["sent"].at[self.team])
        pl.when((self.split == 0) & (self.member == 0))(
            lambda: self.collect(self.tiles - 1)
        )

    def gathered_at(self, tile):
        """What the splits send of a tile."""
        return self.parts["gathered"].at[lax.rem(tile, 2), self.team]
