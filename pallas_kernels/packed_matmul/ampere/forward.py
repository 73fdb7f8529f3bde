"""The forward kernel of 'ampere': y = x @ W.T (+ u @ v.T), computed as y.T."""

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
      addend: The pair (u, v) in x's dtype, r a multiple of 64; None adds nothing.
      config: Tiling.
      codebook: The 16 values that codes stand for: 'nf4', 'fp4' or 'int4'.
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
    low_rank = tiles.rank_steps(addend)
    pairs = [registers.plane_pair(config.decoder, half) for half in (0, 1)]
    strips = 64 // depth
    multiplier = pipeline.Multiplier(config, x.dtype, 1, bn)
    assert 2 <= x_stages < 2 * w_stages, config

    def kernel(linear, x_g, w_g, s_g, *rest):
        *uv, out_g, parts = rest
        x_s, w_s, s_s = parts["x"], parts["words"], parts["scales"]
        split, i, j = tiles.place(linear, mi, ni, config)
        tokens, rows = pl.ds(i * bm, bm), pl.ds(j * bn, bn)

        def place(step):
            """Group of 256 elements, and strip of its planes."""
            step = split * steps + jnp.minimum(step, steps - 1)
            return lax.div(step, jnp.int32(strips)), lax.rem(step, jnp.int32(strips))

        def fetch_words(step, slot):
            group, strip = place(step)
            columns = pl.ds(group * 64 + strip * depth, depth)
            pipeline.copy(w_g.at[rows, columns], w_s.at[slot])
            pipeline.copy(s_g.at[group, j], s_s.at[slot])

        def fetch_x(step, half, slot):
            group, strip = place(step)
            for number, plane in enumerate(pairs[half]):
                column = group * 256 + plane * 64 + strip * depth
                pipeline.copy(
                    x_g.at[tokens, pl.ds(column, depth)], x_s.at[slot, number]
                )

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
                pipeline.copy(uv[1].at[rows, columns], w_s.at[strip])
                pipeline.copy(uv[0].at[tokens, columns], x_s.at[0, strip])
            pipeline.wait()
            for strip in range(strips):
                bits = plgpu.load(w_s.at[strip], layout=multiplier.left)
                a = lax.bitcast_convert_type(bits, x.dtype)
                sums = multiplier.add(sums, {0: a}, x_s.at[0, strip])
            pipeline.wait()
            return sums

        def step(s, carry):
            x_slot, w_slot, sums = carry
            for half in (0, 1):
                # Groups of the turns behind the one that began this turn's x.
                pipeline.wait(
                    sum(2 + 2 * ((half - t) % 2 == 0) for t in range(1, x_stages - 1))
                )
                if half == 0:
                    ahead = w_stages - 1
                    fetch_words(s + ahead, pipeline.after(w_slot, ahead, w_stages))
                ahead = x_stages - 1
                use = half + ahead
                fetch_x(s + use // 2, use % 2, pipeline.after(x_slot, ahead, x_stages))
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
                    a = tiles.scaled(values[number], scale, 0, x.dtype, multiplier.left)
                    sums = multiplier.add(sums, {0: a}, x_s.at[x_slot, number])
                x_slot = pipeline.after(x_slot, 1, x_stages)
            return x_slot, pipeline.after(w_slot, 1, w_stages), sums

        sums = multiplier.zeros()
        if low_rank:
            extra = tiles.in_first_split(low_rank, split, config)
            sums = lax.fori_loop(0, extra, low_rank_step, sums)
        for turn in range(-2 * (w_stages - 1), 0):
            fetch_ahead(turn)
        slots = jnp.int32(0), jnp.int32(0)
        *_, sums = lax.fori_loop(0, steps, step, (*slots, sums))
        pipeline.wait()
        if splits > 1:
            multiplier.store(sums, 0, out_g.at[:, rows, tokens], split)
        else:
            multiplier.store(sums, 0, out_g.at[tokens, rows], None)

    scratch = {
        "x": plgpu.SMEM(
            (x_stages, 2, bm, depth), x.dtype, transforms=pipeline.swizzled(depth, bm)
        ),
        "words": plgpu.SMEM(
            (w_stages, bn, depth), jnp.uint16, transforms=pipeline.swizzled(depth)
        ),
        "scales": plgpu.SMEM((w_stages, 4, bn), scales.dtype),
    }
    return pipeline.launch(
        kernel,
        [x, codes, pipeline.by_tile(scales, bn), *tiles.addend_operands(addend)],
        tiles.out_type(m, n, x.dtype, config),
        scratch,
        splits * mi * ni,
        num_sms,
        config,
        codebook,
        interpret,
    )
