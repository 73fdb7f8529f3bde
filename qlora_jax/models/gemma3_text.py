"""Gemma 3 (text): norms on q and k; windows and rotary positions local but in each sixth."""

from typing import Any

from qlora_jax.models import gemma, gemma2, llama, reading
from qlora_jax.nn.rope import Rope

MODEL_TYPE = "gemma3_text"
NAMES = gemma2.NAMES | llama.QK_NORM
IGNORED = llama.IGNORED
DEFAULTS = gemma.DEFAULTS | {
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    hf["hidden_act"] = hf["hidden_activation"]
    types, found = reading.full_each(hf, hf["sliding_window_pattern"])
    rope = hf.get("rope_parameters") or {}
    far, near = rope.get("full_attention"), rope.get(reading.SLIDING)
    if far is None:
        far = {"rope_theta": hf.get("rope_theta") or 1e6}
        far |= hf.get("rope_scaling") or {}
    near = near or {"rope_theta": hf.get("rope_local_base_freq") or 1e4}
    scaling, theta, _, _ = reading.read_rope(hf, near)
    config, problems = gemma.read_gemma(
        hf,
        found,
        rope=far,
        norms="both",
        qk_norm="head",
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        logit_softcap=hf.get("final_logit_softcapping"),
        types=types,
        sliding_rope=Rope(theta=theta, dim=reading.head_dim(hf)),
    )
    if scaling is not None:
        problem = (
            f"the sliding layers' rope_scaling is {scaling.kind}; none is supported"
        )
        return None, [*problems, problem]
    return config, problems
