"""DeepSeek V2 and Coder V2: latent attention, and a softmax over experts.

Experts are the best of all, or the best of the groups that have the best ones.
"""

from typing import Any

from qlora_jax.models import deepseek_v3, llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "deepseek_v2"
NAMES = deepseek_v3.NAMES
PARAMETERS = deepseek_v3.PARAMETERS
IGNORED = llama.IGNORED
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
}
_GREEDY, _OF_GROUPS = "greedy", "group_limited_greedy"


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = {"n_group": 1, "topk_group": 1} | DEFAULTS | hf
    if hf["topk_method"] != _OF_GROUPS:
        hf |= {"n_group": 1, "topk_group": 1}
    problems = deepseek_v3.routing_problems(hf, "softmax", (_GREEDY, _OF_GROUPS))
    if hf["norm_topk_prob"]:
        problems.append(
            "norm_topk_prob is true, expected false: transformers does not heed it in this "
            "family, and DeepSeek's own code does, so it says nothing sure"
        )
    if "num_experts_per_tok" not in hf:
        problems.append("num_experts_per_tok is missing")
        hf |= {"num_experts_per_tok": 1}
    experts = ExpertsSpec(
        groups=hf["n_group"],
        top_groups=hf["topk_group"],
        best_of_group=1,
        scale=hf["routed_scaling_factor"],
        shared_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
    )
    return deepseek_v3.read_latent(
        hf,
        problems + mixture.group_problems(hf, 1),
        interleaved=True,
        feed_forwards=mixture.layers(hf, range(hf["first_k_dense_replace"]), experts),
        normalize_experts=False,
    )
