"""Folders of models whose layers are in several stacks: in turns, unlike, or stored unlike."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.models import Decoder, hf_table
from qlora_jax.nn.packing import dequantize
from qlora_jax.sources.save import places
from qlora_jax.sources.source import open_source

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TURNS = SIZES | {"model_type": "gemma2", "num_hidden_layers": 5, "sliding_window": 3}
"""Windows on every other layer; the last one is alone."""
DENSE_FIRST = SIZES | {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [0]},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
"""A layer without experts before two with them."""
OF_OTHER_SIZES = SIZES | {
    **{"model_type": "gemma4_text", "num_hidden_layers": 2, "global_head_dim": 16},
    **{"layer_types": ["sliding_attention", "full_attention"]},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96},
}
"""A layer whose heads are larger than those of the one before, and a linear outside of both."""
KEPT = "model.layers.1.mlp.down_proj.weight"
"""What `mixed` keeps dense of its 4-bit linears."""


def written(folder: Path, hf: dict[str, Any]) -> Path:
    """Writes a dense folder of random weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    config = open_source(folder).config
    shapes = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    tensors = {
        place.name: 0.2 * rng.standard_normal(place.shape, np.float32)
        for place in places(shapes, hf_table(config))
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def mixed(folder: Path) -> Path:
    """Writes a 4-bit folder that keeps one linear of one layer dense, as it decodes."""
    dense = written(
        folder.with_name(f"{folder.name}-dense"), {**TURNS, "num_hidden_layers": 3}
    )
    whole, _ = qlora.load(dense, qlora.QuantConfig(), dtype="float32")
    qlora.save_model(whole, folder, source=dense)
    stack = whole.layers["1:2"]
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if not k.startswith(KEPT)}
    tensors[KEPT] = np.asarray(dequantize(stack.mlp.down_proj.quantized[0], "float32"))
    save_file(tensors, folder / "model.safetensors")
    return folder
