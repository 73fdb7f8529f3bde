"""bitsandbytes' own tensors: loading is exact, quantizing as its README allows (C2)."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook, layout
from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn.packing import dequantize, quantize_tensor

VECTORS = (
    "normal_64x64",
    "outliers_32x128",
    "zero_blocks_16x128",
    "ragged_33x40",
    "odd_count_7x33",
    "midpoint_ties_4x64",
    "fp4_64x64",
    "bf16_input_64x128",
    "llm_std_192x128",
    "normal_256x256_multi_nested",
    "normal_bs128_16x1024",
)
BF16 = jnp.dtype("bfloat16")
# Of normal_256x256_multi_nested: its arrays are too large to ship.
MULTI_NESTED_SHA256 = {
    "float32": "fcfcdf94baed3bab69af22dd3cf312daddd6eaa5c9c60df9ddba728e63173c87",
    "bfloat16": "e718d4f5a23f9bd68f3be991607a3155302d02d7571c4a56c984ee759f668ce2",
}


@pytest.fixture(params=VECTORS)
def vector(request, golden):
    """A case: its arrays, and its state dicts with and without double quantization."""
    case = dict(np.load(golden(f"vectors/{request.param}.npz")))
    for form in ("dq", "nodq"):
        case[form] = load_file(golden(f"vectors/{request.param}.{form}.safetensors"))
    return case


def source(case: dict) -> jax.Array:
    if "input_raw_u16" in case:
        return jnp.asarray(case["input_raw_u16"].view(BF16))
    return jnp.asarray(case["input_f32"])


@functools.partial(jax.jit, static_argnums=1)
def quantize_both(w: jax.Array, config: QuantConfig):
    plain = dataclasses.replace(config, double_quant=False)
    return quantize_tensor(w, config), quantize_tensor(w, plain)


def quantized(case: dict) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Quantizes the source: with double quantization and without."""
    name = next(key for key in case["dq"] if "quant_state" in key)
    state = json.loads(case["dq"][name].tobytes())
    config = QuantConfig(codebook=state["quant_type"], block_size=state["blocksize"])
    return quantize_both(source(case), config)


@jax.jit
def decode(q):
    """Decodes to both dtypes in one compilation."""
    return dequantize(q, "float32"), dequantize(q, "bfloat16")


@pytest.mark.parametrize("form", ["dq", "nodq"])
def test_a_loaded_tensor_decodes_to_the_same_bits(vector, form):
    q = QuantizedTensor.from_storage(vector[form], "weight")
    wide, short = decode(q)
    expected = vector[f"dequant_{form}"]
    # assert_array_equal takes -0 for 0: a zero block may decode to either.
    if expected.dtype == np.uint16:
        assert q.dtype == "bfloat16"
        np.testing.assert_array_equal(short, expected.view(BF16))
        return
    assert q.dtype == "float32"
    np.testing.assert_array_equal(wide, expected)
    bits = vector.get(f"dequant_{form}_bf16_u16", expected.astype(BF16).view(np.uint16))
    np.testing.assert_array_equal(short, bits.view(BF16))


def test_a_large_tensor_with_several_scales_decodes_to_the_same_bits(golden):
    path = golden("vectors/normal_256x256_multi_nested.dq.safetensors")
    q = QuantizedTensor.from_storage(load_file(path), "weight")
    assert q.absmax_scale.shape == (4,) and q.layout == "planar256"
    for values in decode(q):
        digest = hashlib.sha256(np.asarray(values)).hexdigest()
        assert digest == MULTI_NESTED_SHA256[values.dtype.name]


def test_quantizing_gives_the_same_absmax_and_codes(vector):
    q, plain = quantized(vector)
    np.testing.assert_array_equal(plain.absmax.reshape(-1), vector["absmax_f32"])
    np.testing.assert_array_equal(plain.codes, q.codes)
    ours = layout.unpack(np.asarray(q.codes), q.layout, q.shape)
    theirs = layout.unpack(vector["packed"], "flat", q.shape)
    block = np.arange(ours.size) // q.block_size
    zero = (vector["absmax_f32"] == 0)[block]  # their code differs by platform there
    np.testing.assert_array_equal(ours[~zero], theirs[~zero])
    assert (codebook.values(q.codebook)[ours[zero]] == 0).all()


def test_quantizing_absmax_gives_the_same_scales_and_codes_within_one(vector):
    q, _ = quantized(vector)
    # A mean is summed in another order here, which moves all that is made from it.
    np.testing.assert_allclose(q.absmax_offset, vector["dq_offset"], atol=1e-6)
    np.testing.assert_allclose(q.absmax_scale, vector["dq_nested_absmax"], atol=2e-6)
    spread = np.repeat(vector["dq_nested_absmax"], 256)[: q.blocks]
    ours = np.asarray(q.absmax_codes, int).reshape(-1)
    theirs = vector["dq_absmax_u8"].astype(int)
    assert np.abs(ours - theirs)[spread != 0].max(initial=0) <= 1


def test_quantizing_loses_no_more_than_bitsandbytes(vector):
    w = np.asarray(source(vector), np.float64)
    for form, q in zip(("dq", "nodq"), quantized(vector), strict=True):
        expected = vector[f"dequant_{form}"]
        if expected.dtype == np.uint16:
            expected = expected.view(BF16)
        ours = oracle.decoded(q).astype(expected.dtype).astype(np.float64)
        theirs = expected.astype(np.float64)
        assert np.linalg.norm(ours - w) <= np.linalg.norm(theirs - w) * 1.001 + 1e-6
