"""DeepSeek V3, R1 and Moonlight: latent attention, and the experts that GLM-4.5 took over.

What predicts several tokens is left out.
"""

from typing import Any

from qlora_jax.models import glm4_moe, llama, mixture, reading
from qlora_jax.models.spec import LatentSpec

MODEL_TYPE = "deepseek_v3"
_ATTN = "model.layers.{}.self_attn"
LATENT = {
    "layers.attn.q_a_proj.kernel": f"{_ATTN}.q_a_proj.weight",
    "layers.attn.q_a_proj.bias": f"{_ATTN}.q_a_proj.bias",
    "layers.attn.q_a_norm.weight": f"{_ATTN}.q_a_layernorm.weight",
    "layers.attn.q_b_proj.kernel": f"{_ATTN}.q_b_proj.weight",
    "layers.attn.kv_a_proj_with_mqa.kernel": f"{_ATTN}.kv_a_proj_with_mqa.weight",
    "layers.attn.kv_a_proj_with_mqa.bias": f"{_ATTN}.kv_a_proj_with_mqa.bias",
    "layers.attn.kv_a_norm.weight": f"{_ATTN}.kv_a_layernorm.weight",
    "layers.attn.kv_b_proj.kernel": f"{_ATTN}.kv_b_proj.weight",
}
NAMES = glm4_moe.NAMES | LATENT
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "rope_interleave": True,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    dense = range(hf["first_k_dense_replace"])
    feed_forwards = mixture.layers(hf, dense, glm4_moe.corrected_experts(hf))
    return read_latent(
        hf,
        routing_problems(hf, "sigmoid", ("noaux_tc",)) + mixture.group_problems(hf),
        interleaved=bool(hf["rope_interleave"]),
        feed_forwards=feed_forwards,
        normalize_experts=bool(hf["norm_topk_prob"]),
    )


def routing_problems(
    hf: dict[str, Any], score: str, methods: tuple[str, ...]
) -> list[str]:
    """Returns what of DeepSeek's fields on routing a family has not.

    Args:
      hf: The object of config.json.
      score: What the family makes weights of outputs by.
      methods: How it can choose experts; the first is what it does where nothing is said.
    """
    problems = []
    if (given := hf.get("scoring_func", score)) != score:
        problems.append(f"scoring_func is {given!r}, expected {score!r}")
    if (given := hf.get("topk_method", methods[0])) not in methods:
        problems.append(f"topk_method is {given!r}; known: {', '.join(methods)}")
    if (every := hf.get("moe_layer_freq", 1)) != 1:
        problems.append(
            f"moe_layer_freq is {every}, expected 1: transformers has experts in every layer "
            "behind the dense ones, and so has this"
        )
    return problems


def read_latent(
    hf: dict[str, Any], problems: list[str], *, interleaved: bool, **given: Any
) -> reading.Read:
    """Reads what families with latent attention share.

    Args:
      hf: The object of config.json, with defaults.
      problems: Problems that were found already.
      interleaved: Whether neighbouring features are rotated with each other.
      **given: More of what `reading.read` takes.
    """
    heads, layers = hf.get("num_attention_heads"), hf.get("num_hidden_layers") or 0
    problems = list(problems)
    if (kv_heads := hf.get("num_key_value_heads") or heads) != heads:
        problems.append(
            f"num_key_value_heads is {kv_heads}, expected num_attention_heads, which is "
            f"{heads}: every head has keys and values of its own in latent attention"
        )
    plain, rotated = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
    if rotated % 2:
        problems.append(f"qk_rope_head_dim is {rotated}, expected an even number")
    scaling, _, partial, _ = reading.read_rope(hf)
    if partial != 1:
        problems.append(
            f"partial_rotary_factor is {partial}, expected 1: qk_rope_head_dim says what of "
            "a head is rotated"
        )
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    scale = None
    if scaling is not None and (m := rope.get("mscale_all_dim")):
        grown = reading.yarn_scale(scaling.factor, m)
        scale = grown**2 * (plain + rotated) ** -0.5
    spec = LatentSpec(
        query_rank=hf["q_lora_rank"],
        latent_rank=hf["kv_lora_rank"],
        value_dim=hf["v_head_dim"],
    )
    fields: dict[str, Any] = {
        "rotary_dim": rotated,
        "rope_interleaved": interleaved,
        "attention_scale": scale,
        "mixers": [spec] * layers,
        "intermediate_size": hf["moe_intermediate_size"],
        "num_experts": hf["n_routed_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
    }
    return reading.read(hf | {"head_dim": plain + rotated}, problems, **fields | given)
