"""The backward kernel of 'ampere': dx = dy @ W (+ u @ v.T), computed as dx.T."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array, Float, UInt16
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul import registers, tiles
from pallas_kernels.packed_matmul.ampere import pipeline
from pallas_kernels.packed_matmul.ampere.config import Config


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
      codes: planar256 words, uint16 (n, k/4).
      scales: One a block of 64, (k/64, n): float32 for exact decoders, else dy's dtype.
      addend: The pair (u, v) in dy's dtype, r a multiple of 64; None adds nothing.
      config, codebook, num_sms, interpret: See `forward`.

    Returns:
      (m, k) in dy's dtype; with split_k > 1 float32 parts (split_k, k, m) to be summed.
    """
    m, n = dy.shape
    k = codes.shape[1] * 4
    bm, splits, stages = config.block_m, config.split_k, config.x_stages
    planes = config.rows // 64
    halves, shares = planes // 2, 4 // planes  # of a tile, of a group of words
    mi, ki, steps = m // bm, k // config.rows, n // 64 // splits
    low_rank = tiles.rank_steps(addend)
    multiplier = pipeline.Multiplier(config, dy.dtype, planes, 64)
    assert 2 <= stages == config.weight_stages and planes in (2, 4), config

    def kernel(linear, dy_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_s, w_s, s_s = parts["x"], parts["words"], parts["scales"]
        split, i, j = tiles.place(linear, mi, ki, config)
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
            pipeline.copy(w_g.at[rows, pl.ds(group * 64, 64)], w_s.at[slot])
            pipeline.copy(s_g.at[group, step], s_s.at[slot])
            pipeline.copy(dy_g.at[tokens, rows], x_s.at[slot])

        def low_rank_step(s, sums):
            ranks = pl.ds(s * 64, 64)
            pipeline.copy(uv[0].at[tokens, ranks], x_s.at[0])
            for half in range(halves):
                for number in (0, 1):
                    pipeline.copy(
                        uv[1].at[columns(half, number), ranks], w_s.at[number]
                    )
                pipeline.wait()
                operands = {}
                for number in (0, 1):
                    bits = plgpu.load(w_s.at[number], layout=multiplier.left)
                    a = lax.bitcast_convert_type(bits, dy.dtype)
                    operands[2 * half + number] = a
                sums = multiplier.add(sums, operands, x_s.at[0])
                pipeline.wait()
            return sums

        def step(s, carry):
            slot, sums = carry
            pipeline.wait(3 * (stages - 2))
            fetch(s + stages - 1, pipeline.after(slot, stages - 1, stages))
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
                    operands[2 * half + number] = tiles.scaled(
                        values[number], scale, 1, dy.dtype, multiplier.left
                    )
                sums = multiplier.add(sums, operands, x_s.at[slot])
            return pipeline.after(slot, 1, stages), sums

        sums = multiplier.zeros()
        if low_rank:
            extra = tiles.in_first_split(low_rank, split, config)
            sums = lax.fori_loop(0, extra, low_rank_step, sums)
        for number in range(stages - 1):
            fetch(jnp.int32(number), number)
        _, sums = lax.fori_loop(0, steps, step, (jnp.int32(0), sums))
        pipeline.wait()
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
        "x": plgpu.SMEM(
            (stages, bm, 64), dy.dtype, transforms=pipeline.swizzled(64, bm)
        ),
        "words": plgpu.SMEM(
            (stages, 64, 64), jnp.uint16, transforms=pipeline.swizzled(64)
        ),
        "scales": plgpu.SMEM((stages, 4, 64), scales.dtype),
    }
    return pipeline.launch(
        kernel,
        [dy, codes, pipeline.by_tile(scales, 64), *tiles.addend_operands(addend)],
        tiles.out_type(m, k, dy.dtype, config),
        scratch,
        splits * mi * ki,
        num_sms,
        config,
        codebook,
        interpret,
    )
