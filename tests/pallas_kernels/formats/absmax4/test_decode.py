"""Encoding and decoding, against plain numpy."""

import jax
import numpy as np
import oracle
import pytest

from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.formats.absmax4 import encode as encoding

encode = jax.jit(encoding.encode, static_argnums=(1, 2))


def weight(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize("codebook", cb.CODEBOOKS)
def test_encode_takes_the_nearest_value_of_the_codebook(codebook):
    w = weight((64, 64))
    codes, absmax = encode(w, 64, codebook)
    np.testing.assert_array_equal(absmax, np.abs(w).max(1))
    table = cb.values(codebook).astype(np.float64)
    scaled = w.astype(np.float64) / np.abs(w).max(1, keepdims=True)
    distance = np.abs(scaled[..., None] - table)
    chosen = np.take_along_axis(distance, np.asarray(codes).reshape(64, 64, 1), -1)
    np.testing.assert_allclose(chosen[..., 0], distance.min(-1), atol=1e-6)


@pytest.mark.parametrize("codebook", cb.CODEBOOKS)
def test_encode_sends_a_tie_to_the_lower_value(codebook):
    midpoints, order = cb.thresholds(codebook)
    inside = np.abs(midpoints) < 1  # int4's first lies beyond what absmax lets through
    w = np.zeros((1, 16), np.float32)
    w[0, :15] = np.where(inside, midpoints, 0)
    w[0, 15] = 1
    codes, _ = encode(w, 16, codebook)
    np.testing.assert_array_equal(codes[:15][inside], order[:15][inside])


@pytest.mark.parametrize("codebook", cb.CODEBOOKS)
def test_encode_gives_back_the_codes_of_decoded_values(codebook):
    table = cb.values(codebook)
    table = table[np.abs(table) <= 1]  # without int4's unused -8/7
    w = np.zeros((1, 16), np.float32)
    w[0, : table.size] = 3 * table
    codes, absmax = encode(w, 16, codebook)
    assert absmax == 3
    np.testing.assert_array_equal(cb.values(codebook)[codes][: table.size], table)


@pytest.mark.parametrize("codebook", cb.CODEBOOKS)
def test_encode_maps_a_zero_block_to_the_value_zero(codebook):
    w = np.zeros((1, 16), np.float32)
    codes, absmax = encode(w, 16, codebook)
    assert absmax == 0
    assert (cb.values(codebook)[codes] == 0).all()


def test_encode_pads_an_odd_count_with_one_zero_element():
    codes, absmax = encode(weight((3, 5)), 64, "nf4")
    assert codes.shape == (16,) and absmax.shape == (1,)
    assert cb.values("nf4")[codes[15]] == 0


def test_decoding_is_exact_inside_a_larger_program():
    # Fused into other arithmetic, a multiply-add may not replace the product and the
    # sum of double quantization (contract C2): 2048 blocks would show it.
    q = oracle.quantized((2048, 64))
    doubled = jax.jit(lambda q: q.decode_one("float32") * 2)(q)
    np.testing.assert_array_equal(doubled, oracle.decoded(q) * 2)
