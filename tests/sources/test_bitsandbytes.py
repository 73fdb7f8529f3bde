"""What config.json says of packed weights: read, written, and what is refused."""

import json

import numpy as np
import oracle
import pytest

from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import CheckpointError
from qlora_jax.sources import bitsandbytes


@pytest.mark.parametrize(
    ("read", "entries", "message"),
    [
        (
            bitsandbytes.read,
            {"a.weight.absmax": np.ones(1)},
            "a.weight: no quant_state",
        ),
        (
            lambda entries, name: bitsandbytes.read_int8(entries, name, "float32"),
            {"a.weight": np.zeros((2, 3), np.int8)},
            "a.SCB is missing",
        ),
    ],
)
def test_entries_that_are_no_weight_are_a_checkpoints_error(read, entries, message):
    with pytest.raises(CheckpointError, match=message):
        read(entries, "a.weight")


def test_a_linear_is_told_from_a_table():
    linear, table = {"a.weight", "a.weight.absmax"}, {"a.weight", "a.SCB"}
    assert bitsandbytes.is_packed(linear, "a.weight")
    assert not bitsandbytes.is_packed_table(linear, "a.weight")
    assert bitsandbytes.is_packed_table(table, "a.weight")
    assert not bitsandbytes.is_packed(table, "a.weight")


def test_a_written_quantization_config_reads_back():
    for config in (QuantConfig(), QuantConfig(codebook="fp4", double_quant=False)):
        q = oracle.quantized(
            (2, 64), codebook=config.codebook, double_quant=config.double_quant
        )
        hf = {"quantization_config": bitsandbytes.quantization_config(q, "bfloat16")}
        assert bitsandbytes.read_quantization_config(hf) == (config, [])
    assert bitsandbytes.read_quantization_config({}) == (None, [])


def test_the_written_quantization_config_is_that_of_transformers(golden):
    folder = golden("models/llama_bnb_nf4_dq_float32")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    q = oracle.quantized((2, 64))
    assert bitsandbytes.quantization_config(q, "float32") == stored


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, "quant_method 'hqq'; known: bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "af4",
            },
            "'af4'; known: nf4, fp4",
        ),
    ],
)
def test_other_quantizations_are_refused(stored, message):
    config, problems = bitsandbytes.read_quantization_config(
        {"quantization_config": stored}
    )
    assert config is None and message in problems[0]
