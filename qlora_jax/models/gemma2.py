"""Gemma 2: soft caps, windows on every other layer, norms before and after."""

from typing import Any

from qlora_jax.models import gemma, llama, reading

MODEL_TYPE = "gemma2"
NAMES = llama.NAMES | {
    "layers.attn_post_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
IGNORED = llama.IGNORED
DEFAULTS = gemma.DEFAULTS | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    hf["hidden_act"] = hf["hidden_activation"]
    layers = range(hf.get("num_hidden_layers") or 0)
    types = (reading.FULL if i % 2 else reading.SLIDING for i in layers)
    return gemma.read_gemma(
        hf,
        norms="both",
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf["attn_logit_softcapping"],
        logit_softcap=hf["final_logit_softcapping"],
        types=types,
    )
