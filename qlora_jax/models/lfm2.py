"""LFM2: short convolutions between gates, and attention in some layers."""

from collections.abc import Sequence
from typing import Any

from qlora_jax.models import llama, reading
from qlora_jax.models.spec import AttentionSpec, ShortConvSpec

MODEL_TYPE = "lfm2"
_LAYER = "model.layers.{}"
MLP = f"{_LAYER}.feed_forward"
LINEARS = ("w1", "w3", "w2")  # gate, up and down
NAMES = llama.NAMES | {
    "norm.weight": "model.embedding_norm.weight",
    "layers.attn_norm.weight": f"{_LAYER}.operator_norm.weight",
    "layers.mlp_norm.weight": f"{_LAYER}.ffn_norm.weight",
    "layers.attn.q_norm.weight": f"{_LAYER}.self_attn.q_layernorm.weight",
    "layers.attn.k_norm.weight": f"{_LAYER}.self_attn.k_layernorm.weight",
    "layers.attn.o_proj.kernel": f"{_LAYER}.self_attn.out_proj.weight",
    "layers.attn.in_proj.kernel": f"{_LAYER}.conv.in_proj.weight",
    "layers.attn.in_proj.bias": f"{_LAYER}.conv.in_proj.bias",
    "layers.attn.conv.weight": f"{_LAYER}.conv.conv.weight",
    "layers.attn.conv.bias": f"{_LAYER}.conv.conv.bias",
    "layers.attn.out_proj.kernel": f"{_LAYER}.conv.out_proj.weight",
    "layers.attn.out_proj.bias": f"{_LAYER}.conv.out_proj.bias",
    "layers.mlp.gate_proj.kernel": f"{MLP}.w1.weight",
    "layers.mlp.up_proj.kernel": f"{MLP}.w3.weight",
    "layers.mlp.down_proj.kernel": f"{MLP}.w2.weight",
}
IGNORED = llama.IGNORED
SHARED = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
}
"""Defaults of LFM2, dense or not."""

DEFAULTS = SHARED | {
    "intermediate_size": 12288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
_CONV = "conv"


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    wide = hf.get("block_ff_dim", hf["intermediate_size"])
    if hf["block_auto_adjust_ff_dim"]:
        wide = int(2 * wide / 3)
        if (factor := hf["block_ffn_dim_multiplier"]) is not None:
            several = hf["block_multiple_of"]
            wide = -(-int(factor * wide) // several) * several
    attends = hf.get("full_attn_idxs")
    layers = range(hf.get("num_hidden_layers") or 0)
    types = [reading.FULL if attends is None or i in attends else _CONV for i in layers]
    return read_hybrid(hf, types, intermediate_size=wide)


def read_hybrid(
    hf: dict[str, Any], default: Sequence[str] | None = None, **given: Any
) -> reading.Read:
    """Reads what LFM2 has, dense or not.

    Args:
      hf: The object of config.json, with defaults.
      default: What layer_types is where config.json has none.
      **given: More of what `reading.read` takes.
    """
    types, count = hf.get("layer_types") or default, hf.get("num_hidden_layers") or 0
    if types is None:
        problems = ["layer_types is missing"]
    else:
        problems = reading.kind_problems(types, count, (reading.FULL, _CONV))
    conv = ShortConvSpec(taps=hf["conv_L_cache"], bias=bool(hf["conv_bias"]))
    if (tied := hf.get("tie_embedding")) is not None:
        hf = hf | {"tie_word_embeddings": tied}
    return reading.read(
        hf,
        problems,
        mixers=[conv if kind == _CONV else AttentionSpec() for kind in types or ()],
        rms_norm_eps=hf["norm_eps"],
        qk_norm="head",
        attention_bias=False,
        output_bias=False,
        activation="silu",  # whatever hidden_act says, as in transformers
        **given,
    )
