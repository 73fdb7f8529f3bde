"""GLM-4.7-Flash: the layers of GLM-4.7 with latent attention.

What predicts several tokens is left out.
"""

from typing import Any

from qlora_jax.models import deepseek_v3, glm4_moe, llama, mixture, reading

MODEL_TYPE = "glm4_moe_lite"
NAMES = deepseek_v3.NAMES
PARAMETERS = deepseek_v3.PARAMETERS
IGNORED = llama.IGNORED
DEFAULTS = {
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "rope_interleave": True,
}
_DENSE, _SPARSE = "dense", "sparse"


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    count = hf.get("num_hidden_layers") or 0
    first = hf.get("first_k_dense_replace", 1)
    kinds = hf.get("mlp_layer_types") or [
        _DENSE if i < first else _SPARSE for i in range(count)
    ]
    problems = reading.kind_problems(
        kinds, count, (_DENSE, _SPARSE), name="mlp_layer_types"
    )
    dense = [i for i, kind in enumerate(kinds) if kind == _DENSE]
    return deepseek_v3.read_latent(
        hf,
        problems
        + deepseek_v3.routing_problems(hf, "sigmoid", ("noaux_tc",))
        + mixture.group_problems(hf),
        interleaved=bool(hf["rope_interleave"]),
        feed_forwards=mixture.layers(hf, dense, glm4_moe.corrected_experts(hf)),
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
