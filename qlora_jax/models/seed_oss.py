"""Seed-OSS: Llama with biases on q, k and v, and on the output where a config says so.

The dropouts in its config.json are for pretraining; here, as of all families, none applies.
"""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "seed_oss"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
    "attention_out_bias": False,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(hf, output_bias=bool(hf["attention_out_bias"]))
