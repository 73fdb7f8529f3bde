"""SmolLM3: Llama with no rotary positions in every fourth layer."""

import dataclasses
from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "smollm3"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "rope_theta": 2e6,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    every, layers = hf["no_rope_layer_interval"], hf.get("num_hidden_layers") or 0
    rotated = hf.get("no_rope_layers")  # 1 where there are rotary positions
    if rotated is None:
        rotated = [(i + 1) % every != 0 for i in range(layers)]
    problems = []
    if len(rotated) < layers:
        problems.append(
            f"no_rope_layers has {len(rotated)} entries for {layers} layers"
        )
    types = None
    if hf.get("use_sliding_window"):
        types = [reading.FULL if on else reading.SLIDING for on in rotated[:layers]]
    config, problems = reading.read(hf, problems, types=types)
    if config is None:
        return None, problems
    mixers = [
        spec.mixer if on else dataclasses.replace(spec.mixer, rope="none")
        for spec, on in zip(config.specs, rotated, strict=False)
    ]
    return reading.with_layers(config, mixers), []
