"""The forward kernel of 'hopper': y = x @ W.T (+ u @ v.T), computed as y.T."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array, Float, UInt16
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul import registers, tiles
from pallas_kernels.packed_matmul.hopper import pipeline
from pallas_kernels.packed_matmul.hopper.config import Config
from pallas_kernels.packed_matmul.hopper.pipeline import WGMMA


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
      addend: The pair (u, v) in x's dtype, r a multiple of 64; None adds nothing.
      config: Tiling.
      codebook: The 16 values that codes stand for: 'nf4', 'fp4' or 'int4'.
      num_sms: The most blocks to launch, one for each streaming multiprocessor.
      interpret: Parameters of the interpreter; needs the 'select' decoder.

    Returns:
      (m, n) in x's dtype; with split_k > 1 float32 parts (split_k, n, m) to be summed.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, splits = config.block_m, 64 * config.warpgroups, config.split_k
    mi, ni, steps = m // bm, -(-n // bn), k // 256 // splits
    low_rank = tiles.rank_steps(addend)
    order = [p for half in (0, 1) for p in registers.plane_pair(config.decoder, half)]
    uses = 256 // config.x_depth  # slots of x in a step

    def kernel(x_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_ring = pipeline.Ring(**parts["x"], slots=config.x_stages)
        w_ring = pipeline.Ring(**parts["w"], slots=config.weight_stages)

        def each_tile(body):
            """Calls body(split, its low-rank steps, token slice, row start, slots)."""

            @plgpu.nd_loop(
                (splits * mi * ni,),
                collective_axes="sm",
                init_carry=(jnp.int32(0), jnp.int32(0)),
            )
            def _(info, carry):
                split, i, j = tiles.place(info.index[0], mi, ni, config)
                extra = tiles.in_first_split(low_rank, split, config)
                row = pipeline.start_of(j, bn, n)
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
            multiply = pipeline.Multiplier(
                x_ring,
                config.in_flight,
                parts["staging"].at[wg] if interpret else None,
            )

            def tile(split, extra, tokens, row, carry):
                def with_accumulator(acc):
                    def step(s, carry):
                        w_slot, x_slot = carry
                        w_ring.wait(w_slot)
                        words = plgpu.load(words_s.at[w_slot, own], layout=WGMMA)
                        scale = [
                            plgpu.load(
                                scales_s.at[w_slot, p, own], layout=WGMMA.reduce(1)
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
                                layout=WGMMA,
                                table=parts.get("table"),
                            )
                            for i in (0, 1):
                                position = 2 * half + i
                                a = tiles.scaled(values[i], scale[position], 0, x.dtype)
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
                        bits = plgpu.load(words_s.at[w_slot, own], layout=WGMMA)
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
                        pipeline.store_transposed(
                            acc[...].astype(x.dtype),
                            parts["out"].at[wg],
                            out_g.at[tokens, rows],
                        )
                    return after

                return pl.run_scoped(with_accumulator, plgpu.ACC((64, bm), jnp.float32))

            each_tile(tile)

        pipeline.run_roles(config, [x_ring, w_ring], load, compute)

    if addend is not None:  # so that the last low-rank step can fill a buffer
        u = jnp.pad(addend[0], ((0, 0), (0, config.x_depth - 64)))
        addend = (u, addend[1])
    return pipeline.launch(
        kernel,
        [x, codes, scales, *tiles.addend_operands(addend)],
        tiles.out_type(m, n, x.dtype, config),
        pipeline.scratch_types(config, x.dtype, (bn, 64), (4, bn), scales.dtype),
        min(num_sms, splits * mi * ni),
        config,
        codebook,
        interpret,
    )
