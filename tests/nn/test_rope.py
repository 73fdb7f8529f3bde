"""Rotary positions, against complex arithmetic and transformers' rule for scaling."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from qlora_jax.nn.rope import Rope, RopeScaling, inverse_frequencies, rotate, rotation

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_plain_frequencies_fall_geometrically_from_one():
    speeds = inverse_frequencies(64, 10000.0, None)
    np.testing.assert_allclose(speeds, oracle.rope_frequencies({}, 64), rtol=1e-6)
    assert speeds.dtype == np.float32 and speeds[0] == 1


def test_llama3_scaling_slows_the_low_frequencies_alone():
    scaling = RopeScaling(kind="llama3", factor=8.0)
    speeds = inverse_frequencies(128, 500000.0, scaling)
    hf = {"rope_theta": 500000.0, "rope_scaling": LLAMA31}
    np.testing.assert_allclose(speeds, oracle.rope_frequencies(hf, 128), rtol=2e-6)
    plain = inverse_frequencies(128, 500000.0, None)
    ratio = plain / speeds
    np.testing.assert_allclose(ratio[:28], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[-20:], 8, rtol=1e-6)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()  # some lie between


@pytest.mark.parametrize(
    ("factor", "low", "high", "context"), [(32.0, 1.0, 4.0, 8192), (4.0, 2.0, 3.0, 128)]
)
def test_llama3_scaling_follows_its_parameters(factor, low, high, context):
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=context,
    )
    rope = dict(zip(LLAMA31, ("llama3", factor, low, high, context), strict=True))
    np.testing.assert_allclose(
        inverse_frequencies(32, 10000.0, scaling),
        oracle.rope_frequencies({"rope_parameters": rope}, 32),
        rtol=2e-6,
    )


def test_linear_scaling_divides_every_frequency():
    scaled = inverse_frequencies(16, 10000.0, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(scaled, inverse_frequencies(16, 10000.0, None) / 4)


def heads(seq: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, seq, 3, 8)).astype(np.float32)


def test_rotation_turns_the_first_half_against_the_second():
    x = heads()
    at = np.stack([np.arange(5), np.arange(100, 105)])
    speeds = inverse_frequencies(8, 10000.0, None)
    y = rotate(jnp.asarray(x), rotation(jnp.asarray(at, jnp.int32), Rope(dim=8)))
    np.testing.assert_allclose(y, oracle.rotated(x, at, speeds), atol=2e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = heads(1), heads(1)[:, :, ::-1]

    def score(q_at: int, k_at: int) -> np.ndarray:
        at = [jnp.full((2, 1), p, jnp.int32) for p in (q_at, k_at)]
        a, b = (
            rotate(jnp.asarray(x), rotation(p, Rope(dim=8)))
            for x, p in zip((q, k), at, strict=True)
        )
        return np.sum(np.asarray(a) * np.asarray(b), -1)

    np.testing.assert_allclose(score(9, 4), score(57, 52), atol=1e-4)


def test_rotation_is_float32_inside_and_keeps_the_dtype():
    x = jnp.asarray(heads(), jnp.bfloat16)
    at = jnp.full((2, 5), 30000, jnp.int32)  # bfloat16 could not count so far
    speeds = inverse_frequencies(8, 10000.0, None)
    y = rotate(x, rotation(at, Rope(dim=8)))
    assert y.dtype == jnp.bfloat16
    exact = oracle.rotated(
        np.asarray(x, np.float64), np.asarray(at), speeds.astype(np.float64)
    )
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.02)


def test_neighbours_rotate_together_where_pairs_are_interleaved():
    x = heads()
    at = np.stack([np.arange(5), np.arange(100, 105)])
    cos_sin = rotation(jnp.asarray(at, jnp.int32), Rope(dim=6, interleaved=True))
    y = rotate(jnp.asarray(x), cos_sin, interleaved=True)
    order = [0, 2, 4, 1, 3, 5]
    apart = oracle.rotated(x[..., order], at, inverse_frequencies(6, 10000.0, None))
    np.testing.assert_allclose(y[..., order], apart, atol=2e-5)
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])


def test_backward_is_what_negative_positions_would_turn():
    positions = jnp.arange(5)[None]
    for there, back in zip(
        rotation(-positions, Rope(dim=8)),
        rotation(positions, Rope(dim=8, backward=True)),
        strict=True,
    ):
        np.testing.assert_array_equal(there, back)
