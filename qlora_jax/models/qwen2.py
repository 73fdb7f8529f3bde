"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "qwen2"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(
        hf,
        attention_bias=True,
        output_bias=False,
        types=reading.qwen_types(hf),
    )
