"""Moments in 8 bits: the nearest value of the map, block by block.

What an optimizer makes of them is in test_adamw_8bit.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.absmax4.codebook import dynamic_map
from qlora_jax.optim.eight_bit import dequantize_moment, quantize_moment

quantize = jax.jit(quantize_moment, static_argnums=(1, 2))
dequantize = jax.jit(dequantize_moment, static_argnums=(1, 2))


@pytest.mark.parametrize("signed", [True, False])
def test_every_element_takes_the_nearest_value_and_ties_go_down(signed):
    values = dynamic_map(signed)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    rng = np.random.default_rng(0)
    some = rng.uniform(-1, 1, 5000) * 10.0 ** rng.uniform(-9, 0, 5000)
    begins = (np.arange(0, 2**16, 7, dtype=np.uint32) << 16).view(np.float32)
    x = np.concatenate(
        [
            values,
            middles,
            np.nextafter(middles, np.float32(2)),
            np.nextafter(middles, np.float32(-2)),
            some.astype(np.float32),
            begins[np.isfinite(begins)],
            [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0],
        ]
    ).astype(np.float32)
    x = x[np.abs(x) <= 1]
    x = x if signed else np.abs(x)
    x = np.append(x, np.float32(1))  # one block, its absmax 1
    moment = quantize(jnp.asarray(x), signed, x.size)
    np.testing.assert_array_equal(moment.absmax, [1])
    np.testing.assert_array_equal(moment.codes, np.searchsorted(middles, x))
    distance = np.abs(values[None].astype(np.float64) - x[:, None])
    picked = np.take_along_axis(distance, np.asarray(moment.codes)[:, None], 1)[:, 0]
    # A midpoint in float32 may be half of its last bit away from the one between.
    assert (picked - distance.min(1) <= np.spacing(np.abs(x))).all()
    back = dequantize(moment, signed, x.size)
    np.testing.assert_array_equal(back, values[np.asarray(moment.codes)])


@pytest.mark.parametrize(
    "shape, blocks",
    [((), (1,)), ((16, 32), (2,)), ((3, 10, 30), (3, 2)), ((2, 3, 4, 100), (2, 3, 2))],
)
def test_blocks_start_anew_at_each_matrix_of_a_stack(shape, blocks):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    moment = quantize(jnp.asarray(x), True, 256)
    assert moment.codes.shape == shape and moment.codes.dtype == jnp.uint8
    assert moment.absmax.shape == blocks and moment.absmax.dtype == jnp.float32
    back = np.asarray(dequantize(moment, True, 256))
    matrices = zip(
        x.reshape(*blocks[:-1], -1).reshape(np.prod(blocks[:-1], dtype=int), -1),
        back.reshape(np.prod(blocks[:-1], dtype=int), -1),
        np.asarray(moment.absmax).reshape(-1, blocks[-1]),
        strict=True,
    )
    widest = np.diff(dynamic_map()).max() / 2
    for one, other, absmax in matrices:
        for i, largest in enumerate(absmax):
            piece = slice(256 * i, 256 * (i + 1))
            assert largest == np.abs(one[piece]).max()
            error = np.abs(one[piece] - other[piece]).max()
            assert error <= 1.01 * widest * largest  # -1 is not in the map: see below


def test_a_block_of_zeros_and_one_of_almost_nothing_stay_finite():
    x = np.zeros((4, 256), np.float32)
    x[1], x[2] = 1e-45, 1e-38
    for signed in (True, False):
        moment = quantize(jnp.asarray(x), signed, 256)
        back = np.asarray(dequantize(moment, signed, 256))
        assert (np.abs(back) <= 1.2e-38).all()
        np.testing.assert_array_equal(back[[0, 3]], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_block(bad):
    x = np.ones((2, 256), np.float32)
    x[0, 3] = bad
    back = dequantize(quantize(jnp.asarray(x), True, 256), True, 256)
    assert not np.isfinite(back[0, 3])
    np.testing.assert_array_equal(back[1], 1)
