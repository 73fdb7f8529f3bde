"""bitsandbytes' state dicts: read, written back byte for byte, and what is refused."""

import json
import logging

import jax
import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file

from pallas_kernels.formats import FormatError, QuantizedTensor, weight_of
from pallas_kernels.formats.absmax4.codebook import CODEBOOKS

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


def state(entries: dict[str, np.ndarray]) -> dict:
    name = next(key for key in entries if "quant_state" in key)
    return json.loads(entries[name].tobytes())


def same_entries(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if "quant_state" in name:  # JSON: spaces do not matter
            assert json.loads(actual[name].tobytes()) == json.loads(value.tobytes())
            continue
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(actual[name], value)


def same_tensors(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def entries(golden) -> dict[str, np.ndarray]:
    return load_file(golden("vectors/normal_64x64.dq.safetensors"))


@pytest.mark.parametrize("form", ["dq", "nodq"])
@pytest.mark.parametrize("name", VECTORS)
def test_what_bitsandbytes_wrote_is_written_back_as_it_was(golden, name, form):
    stored = load_file(golden(f"vectors/{name}.{form}.safetensors"))
    q = QuantizedTensor.from_storage(stored, "weight")
    assert q.double_quant == (form == "dq")
    same_entries(q.storage("weight"), stored)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((5, 512), 64), ((5, 192), 64), ((7, 33), 64), ((4, 96), 32)],
)
def test_what_we_write_reads_back_as_it_was(shape, block_size, codebook, double_quant):
    q = oracle.quantized(
        shape, block_size=block_size, codebook=codebook, double_quant=double_quant
    )
    written = q.storage("a.weight")
    assert all(name == "a.weight" or name.startswith("a.weight.") for name in written)
    assert written["a.weight"].dtype == np.uint8 and written["a.weight"].shape[1] == 1
    same_tensors(QuantizedTensor.from_storage(written, "a.weight"), q)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_packed_bytes_may_be_stored_as_any_dtype(entries, storage):
    # quant_storage: the same bytes seen as another dtype, (bytes / itemsize, 1).
    viewed = dict(entries)
    viewed["weight"] = entries["weight"].reshape(-1).view(storage).reshape(-1, 1)
    same_tensors(
        QuantizedTensor.from_storage(viewed, "weight"),
        QuantizedTensor.from_storage(entries, "weight"),
    )


def test_an_uncommon_nested_map_is_decoded_exactly_and_said(entries, caplog):
    table = entries["weight.nested_quant_map"].copy()
    table[1:-1] = np.nextafter(table[1:-1], np.float32(1))
    entries["weight.nested_quant_map"] = table
    with caplog.at_level(logging.WARNING):
        q = QuantizedTensor.from_storage(entries, "weight")
    assert "weight: uncommon nested_quant_map" in caplog.text
    product = table[entries["weight.absmax"]] * entries["weight.nested_absmax"]
    expected = product + np.float32(state(entries)["nested_offset"])
    assert not q.double_quant
    np.testing.assert_array_equal(q.absmax.reshape(-1), expected)


def test_another_nested_block_size_is_decoded_exactly(entries):
    changed = state(entries) | {"nested_blocksize": 32}
    name = "weight.quant_state.bitsandbytes__nf4"
    entries[name] = np.frombuffer(json.dumps(changed).encode(), np.uint8)
    scales = np.array([0.5, 0.25], np.float32)
    entries["weight.nested_absmax"] = scales
    q = QuantizedTensor.from_storage(entries, "weight")
    table = entries["weight.nested_quant_map"]
    product = table[entries["weight.absmax"]] * np.repeat(scales, 32)
    np.testing.assert_array_equal(
        q.absmax.reshape(-1), product + np.float32(changed["nested_offset"])
    )


@pytest.mark.parametrize(
    "key", ["quant_map", "absmax", "nested_absmax", "nested_quant_map"]
)
def test_a_missing_part_is_named(entries, key):
    del entries[f"weight.{key}"]
    with pytest.raises(FormatError, match=rf"weight\.{key} is missing"):
        QuantizedTensor.from_storage(entries, "weight")


def test_a_missing_weight_or_state_is_named(entries):
    with pytest.raises(FormatError, match="^other: no quant_state"):
        QuantizedTensor.from_storage(entries, "other")
    del entries["weight"]
    with pytest.raises(FormatError, match="^weight is missing"):
        QuantizedTensor.from_storage(entries, "weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "quant_state is not JSON"),
        (b"\xff\xfe", "quant_state is not JSON"),
        (b"[]", "quant_state is not JSON"),
        (b"[" * 9000, "quant_state is not JSON"),
        (b'{"a": "' + b"x" * 20_000 + b'"}', "quant_state is not JSON"),
        (b'{"quant_type": "nf4", "dtype": "float32"}', "lacks .*blocksize"),
    ],
)
def test_a_state_that_cannot_be_is_refused(entries, text, message):
    entries["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    with pytest.raises(FormatError, match=f"^weight: .*{message}"):
        QuantizedTensor.from_storage(entries, "weight")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocksize", 0),
        ("blocksize", "64"),
        ("dtype", "int8"),
        ("dtype", "torch.float32"),
        ("shape", "64"),
        ("shape", [64, -64]),
        ("nested_blocksize", 0),
        ("nested_blocksize", 10**30),
        ("nested_offset", "much"),
        ("nested_offset", True),
        ("nested_offset", 1e39),
        ("nested_offset", float("nan")),
        ("quant_type", "fp4"),
        ("blocksize", True),
        ("shape", [2**50, 1]),
        ("shape", []),
    ],
)
def test_a_value_of_the_state_that_cannot_be_is_named(entries, key, value):
    text = json.dumps(state(entries) | {key: value}).encode()
    entries["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    with pytest.raises(FormatError, match=f"^weight: .*{key}"):
        QuantizedTensor.from_storage(entries, "weight")


def test_codes_are_no_scales(entries):
    text = {k: v for k, v in state(entries).items() if k != "nested_offset"}
    name = "weight.quant_state.bitsandbytes__nf4"
    entries[name] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    with pytest.raises(FormatError, match="its absmax is uint8, expected floating"):
        QuantizedTensor.from_storage(entries, "weight")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("nested_quant_map", np.zeros(3, np.float32), "has 3 values of float32"),
        ("nested_absmax", np.ones(1, np.int32), "nested_absmax is int32"),
        ("nested_absmax", np.full(1, 1e300), "NaN or Inf in its absmax"),
        ("absmax", np.ones(64, np.float32), "its absmax is float32, expected uint8"),
    ],
)
def test_arrays_of_another_kind_are_refused(entries, part, value, message):
    entries[f"weight.{part}"] = value
    with pytest.raises(FormatError, match=message):
        QuantizedTensor.from_storage(entries, "weight")


def test_a_foreign_codebook_is_refused(entries):
    entries["weight.quant_map"] = entries["weight.quant_map"] * np.float32(1.01)
    with pytest.raises(FormatError, match="weight: its quant_map is not that of nf4"):
        QuantizedTensor.from_storage(entries, "weight")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weight", "2000 bytes, shape .* needs 2048"),
        ("weight.absmax", "60 absmax values, expected 64"),
        ("weight.nested_absmax", "0 nested_absmax values, expected 1"),
    ],
)
def test_arrays_of_the_wrong_size_are_refused(entries, key, message):
    cut = {"weight": 2000, "weight.absmax": 60, "weight.nested_absmax": 0}
    entries[key] = entries[key].reshape(-1)[: cut[key]]
    with pytest.raises(FormatError, match=f"^weight: {message}"):
        QuantizedTensor.from_storage(entries, "weight")


def test_parts_are_told_from_weights(entries):
    assert {weight_of(name) for name in entries} == {"weight"}
    up = "model.layers.0.mlp.up_proj.weight"
    assert weight_of(up) == up
