"""The backward kernel of 'hopper': dx = dy @ W (+ u @ v.T), computed as dx.T."""

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
      codes: planar256 words, uint16 (n, k/4).
      scales: One a block of 64, (k/64, n): float32 for exact decoders, else dy's dtype.
      addend: The pair (u, v) in dy's dtype, r a multiple of 64; None adds nothing.
      config, codebook, num_sms, interpret: See `forward`.

    Returns:
      (m, k) in dy's dtype; with split_k > 1 float32 parts (split_k, k, m) to be summed.
    """
    m, n = dy.shape
    k = codes.shape[1] * 4
    bm, planes, splits = config.block_m, config.planes, config.split_k
    owners = config.warpgroups
    shares = 4 // (owners * planes)  # tiles that share a group of words
    mi, ki, steps = m // bm, k // 256 * shares, -(-n // 64) // splits
    low_rank = tiles.rank_steps(addend)

    def owned(share: Array, wg: Array | int, i: int) -> Any:
        """The i-th plane that a warpgroup owns."""
        if planes == 1:
            return owners * share + wg
        if config.decoder == "permute":  # plane_pair, for a traced warpgroup
            return 2 * wg + i
        return wg + 2 * i

    def kernel(dy_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_ring = pipeline.Ring(**parts["x"], slots=config.x_stages)
        w_ring = pipeline.Ring(**parts["w"], slots=config.weight_stages)

        def each_tile(body):
            """Calls body(split, low-rank steps, token slice, group, share of it, slots)."""

            @plgpu.nd_loop(
                (splits * mi * ki,),
                collective_axes="sm",
                init_carry=(jnp.int32(0), jnp.int32(0)),
            )
            def _(info, carry):
                split, i, j = tiles.place(info.index[0], mi, ki, config)
                group, share = lax.div(j, jnp.int32(shares)), lax.rem(j, shares)
                extra = tiles.in_first_split(low_rank, split, config)
                return body(split, extra, pl.ds(i * bm, bm), group, share, carry)

        def load():
            def tile(split, extra, tokens, group, share, carry):
                def step(s, carry):
                    w_slot, x_slot = carry
                    at = split * steps + s
                    rows = pl.ds(pipeline.start_of(at, 64, n), 64)
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
            multiply = pipeline.Multiplier(
                x_ring,
                config.in_flight,
                parts["staging"].at[wg] if interpret else None,
            )

            def decode(words, share):
                options: dict[str, Any] = {
                    "decoder": config.decoder,
                    "dtype": dy.dtype,
                    "layout": WGMMA,
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
                            words_s.at[w_slot].transpose((1, 0)), layout=WGMMA
                        )
                        scale = [
                            plgpu.load(
                                scales_s.at[w_slot, owned(share, wg, i)],
                                layout=WGMMA.reduce(0),
                            )
                            for i in range(planes)
                        ]
                        values = decode(words, share)
                        products = [
                            (acc, tiles.scaled(v, c, 1, dy.dtype))
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
                                layout=WGMMA,
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
                        pipeline.store_transposed(
                            acc[...].astype(dy.dtype),
                            parts["out"].at[wg],
                            out_g.at[tokens, columns],
                        )
                    return after

                accumulators = [plgpu.ACC((64, bm), jnp.float32)] * planes
                return pl.run_scoped(with_accumulators, *accumulators)

            each_tile(tile)

        pipeline.run_roles(config, [x_ring, w_ring], load, compute)

    if tail := n % 64:  # nothing for rows that the last step takes once more
        whole = n - tail
        gap = jnp.zeros((m, 64 - tail), dy.dtype)
        dy = jnp.concatenate([dy[:, :whole], gap, dy[:, whole:]], axis=1)
    return pipeline.launch(
        kernel,
        [dy, codes, scales, *tiles.addend_operands(addend)],
        tiles.out_type(m, k, dy.dtype, config),
        pipeline.scratch_types(config, dy.dtype, (64, 64), (4, 64), scales.dtype),
        min(num_sms, splits * mi * ki),
        config,
        codebook,
        interpret,
    )
