"""quantize_tensor and dequantize: every dtype, shape, block and transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4.codebook import CODEBOOKS, dynamic_map
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import QLoRAError, ShapeError
from qlora_jax.nn.packing import dequantize, quantize_tensor

# bitsandbytes tests/test_functional.py, test_4bit_quant: mean absolute error of N(0, 1)
# and its allowance of 7 sigma for 1024 x 1024 values.
PUBLISHED = {
    ("nf4", 32): (0.067746, 69e-6),
    ("nf4", 64): (0.072798, 74e-6),
    ("nf4", 128): (0.076831, 91e-6),
    ("nf4", 256): (0.080337, 110e-6),
    ("nf4", 512): (0.083547, 140e-6),
    ("nf4", 1024): (0.086610, 170e-6),
    ("nf4", 2048): (0.089592, 220e-6),
    ("nf4", 4096): (0.092547, 270e-6),
    ("fp4", 64): (0.096543, 100e-6),
}


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def equal(a, b) -> bool:
    leaves = [jax.tree.leaves(tree) for tree in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


@pytest.mark.parametrize(("codebook", "block_size"), PUBLISHED)
def test_mean_error_of_a_normal_weight_is_the_published_one(codebook, block_size):
    w = normal(1024, 1024)
    config = QuantConfig(codebook=codebook, block_size=block_size, double_quant=False)
    q = quantize_tensor(w, config)
    mean, sigma = PUBLISHED[codebook, block_size]
    # In numpy: decoding has tests of its own, and no compilation is needed here.
    assert abs(np.abs(oracle.decoded(q) - w).mean() - mean) < 7 * sigma


def test_mean_error_grows_with_the_block_and_double_quantization_adds_little():
    w = normal(512, 512)
    plain = oracle.decoded(quantize_tensor(w, QuantConfig(double_quant=False)))
    double = oracle.decoded(quantize_tensor(w))
    assert np.abs(double - w).mean() < np.abs(plain - w).mean() * 1.005


def test_nf4_loses_least_on_a_normal_weight():
    w = normal(256, 256)
    errors = {}
    for name in CODEBOOKS:
        q = quantize_tensor(w, QuantConfig(codebook=name, double_quant=False))
        errors[name] = np.abs(oracle.decoded(q) - w).mean()
    assert errors["nf4"] < min(errors["int4"], errors["fp4"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_float_dtype_is_taken_and_given_back(dtype):
    w = normal(4, 128, dtype=dtype)
    q = quantize_tensor(w)
    again = dequantize(q)
    assert q.dtype == dtype and again.dtype == dtype and again.shape == w.shape
    # The arithmetic is float32 whatever the dtype.
    assert equal(q, quantize_tensor(w.astype(jnp.float32)))
    assert dequantize(q, "float32").dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (7,), (7, 33), (3, 2, 64), (2, 300)])
def test_any_shape_can_be_quantized(shape):
    w = normal(*shape)
    q = quantize_tensor(w)
    assert q.shape == shape
    again = dequantize(q)
    assert again.shape == shape
    # A quarter of the largest magnitude is beyond half of NF4's widest gap.
    assert np.abs(again - w).max() < 0.25 * np.abs(w).max() + 1e-6


def test_no_element_is_further_off_than_half_the_widest_gap():
    w = normal(64, 64)
    q = quantize_tensor(w, QuantConfig(double_quant=False))
    widest = 1 - 0.6961928009986877
    bound = (
        np.repeat(np.asarray(q.absmax).reshape(-1), 64).reshape(w.shape) * widest / 2
    )
    assert (np.abs(oracle.decoded(q) - w) <= bound * (1 + 1e-6)).all()


def test_quantizing_what_was_decoded_changes_nothing():
    config = QuantConfig(double_quant=False)
    once = quantize_tensor(normal(8, 256), config)
    assert equal(once, quantize_tensor(jnp.asarray(oracle.decoded(once)), config))


def test_double_quantized_absmax_is_the_nearest_of_the_map():
    w = normal(300, 64)  # 300 blocks: the second scale covers 44
    q = quantize_tensor(w)
    absmax = np.abs(np.asarray(w)).max(1)
    offset = np.asarray(q.absmax_offset)
    np.testing.assert_allclose(offset, absmax.mean(), rtol=1e-6)
    centred = absmax - offset
    for part in (slice(0, 256), slice(256, 300)):
        scale = np.asarray(q.absmax_scale)[part.start // 256]
        np.testing.assert_allclose(scale, np.abs(centred[part]).max(), rtol=1e-6)
        chosen = dynamic_map()[np.asarray(q.absmax_codes).reshape(-1)[part]]
        distance = np.abs(centred[part][:, None] / scale - dynamic_map())
        np.testing.assert_allclose(
            np.abs(centred[part] / scale - chosen), distance.min(1), atol=1e-6
        )


@pytest.mark.parametrize(
    ("shape", "block_size", "scales"),
    [((6, 512), 64, (6, 8)), ((6, 192), 64, (6, 3)), ((3, 2, 64), 64, (6, 1))],
)
def test_scales_are_cut_with_the_rows(shape, block_size, scales):
    for double_quant in (True, False):
        settings = {"block_size": block_size, "double_quant": double_quant}
        q = QuantizedTensor.abstract(shape, (2,), **settings)
        assert (q.absmax_codes or q.absmax).shape == (2, *scales)
    flat = QuantizedTensor.abstract((7, 33), (2,))  # blocks go on into the next row
    assert flat.absmax_codes.shape == (2, 4)


def test_a_zero_tensor_decodes_to_zero():
    for config in (QuantConfig(), QuantConfig(double_quant=False)):
        q = quantize_tensor(jnp.zeros((4, 64)), config)
        assert (oracle.decoded(q) == 0).all()


def test_the_bits_a_weight_are_those_of_the_paper():
    q = quantize_tensor(normal(256, 256))
    plain = quantize_tensor(normal(256, 256), QuantConfig(double_quant=False))
    assert plain.bits == 4.5
    assert q.bits == pytest.approx(4.127, abs=1e-3)


def test_it_runs_under_jit_and_vmap():
    w = normal(3, 4, 128)
    one_by_one = [quantize_tensor(layer) for layer in w]
    assert equal(jax.jit(quantize_tensor)(w[0]), one_by_one[0])
    stack = jax.jit(jax.vmap(quantize_tensor))(w)
    assert stack.shape == (4, 128) and stack.codes.shape == (3, 4, 32)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    # The mean of a batch may be summed in another order: codes alone are exact.
    np.testing.assert_array_equal(stack.codes, expected.codes)
    np.testing.assert_allclose(stack.absmax_offset, expected.absmax_offset, rtol=1e-6)


def test_dequantize_compiles_once_for_tensors_alike():
    first, second = (oracle.quantized((6, 192), seed=seed) for seed in (0, 1))
    dequantize(first)
    compiled = []

    def heard(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        dequantize(second)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert not compiled


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 64), (96, 96), (64, 256)])
def test_a_weight_that_is_not_finite_is_refused(shape, bad):
    # Beyond 32 rows XLA's CPU maximum drops NaN: absmax alone does not tell.
    w = normal(*shape).at[2, 17].set(bad)
    with pytest.raises(ShapeError, match=rf"shape \({shape[0]}, .* has NaN or Inf"):
        quantize_tensor(w)


def test_an_unfit_dtype_is_refused():
    w = jnp.ones((2, 64), jnp.float8_e4m3fn)
    with pytest.raises(ShapeError, match="float8_e4m3fn, expected one of bfloat16"):
        quantize_tensor(w)


def test_an_empty_tensor_is_refused():
    with pytest.raises(ShapeError, match=r"shape \(0, 64\): it is empty"):
        quantize_tensor(jnp.zeros((0, 64)))


def test_errors_are_qlora_errors_and_value_errors():
    assert issubclass(ShapeError, QLoRAError) and issubclass(ShapeError, ValueError)
