"""gpt-oss (20B, 120B): a mixture with biases, and attention with sinks in every head.

Every other layer sees a window. Files hold the experts of a layer together, gate and up in
alternating rows: in bfloat16 with (in, out) matrices, or in MXFP4 with (out, in) ones.
"""

from typing import Any

from qlora_jax.models import llama, reading
from qlora_jax.models.fused import Fused
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "gpt_oss"
_MLP = "model.layers.{}.mlp"
_EXPERTS, _EXPERT = f"{_MLP}.experts", f"{_MLP}.experts.{{}}"
NAMES = llama.NAMES | {
    "layers.attn.sinks.weight": "model.layers.{}.self_attn.sinks",
    "layers.mlp.router.weight": f"{_MLP}.router.weight",
    "layers.mlp.router.bias": f"{_MLP}.router.bias",
    "layers.mlp.experts.gate_proj.kernel": f"{_EXPERT}.gate_proj.weight",
    "layers.mlp.experts.up_proj.kernel": f"{_EXPERT}.up_proj.weight",
    "layers.mlp.experts.down_proj.kernel": f"{_EXPERT}.down_proj.weight",
    "layers.mlp.experts.gate_proj.bias": f"{_EXPERT}.gate_proj.bias",
    "layers.mlp.experts.up_proj.bias": f"{_EXPERT}.up_proj.bias",
    "layers.mlp.experts.down_proj.bias": f"{_EXPERT}.down_proj.bias",
}


def _fused(end: str, part: str, transposed: bool = False) -> tuple[Fused, Fused]:
    """Returns what is stored together under an end, of which our names have another."""
    gate_up = tuple(f"{_EXPERT}.{name}.{part}" for name in ("gate_proj", "up_proj"))
    down = (f"{_EXPERT}.down_proj.{part}",)
    return (
        Fused(f"{_EXPERTS}.gate_up_proj{end}", gate_up, transposed, interleaved=True),
        Fused(f"{_EXPERTS}.down_proj{end}", down, transposed),
    )


FUSED = (
    *_fused("", "weight", transposed=True),
    *_fused("_bias", "bias"),
    *_fused("_blocks", "weight_blocks"),
    *_fused("_scales", "weight_scales"),
)
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    if "num_experts" in hf:
        hf = {"num_local_experts": hf["num_experts"]} | hf
    hf = DEFAULTS | hf
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or _ROPE
    layers = hf.get("num_hidden_layers") or 0
    types = [reading.FULL if i % 2 else reading.SLIDING for i in range(layers)]
    return reading.read(
        hf,
        rope=rope,
        types=types,
        feed_forwards=[ExpertsSpec(router_bias=True)] * layers,
        sinks=True,
        mlp_bias=True,
        clamped_swiglu=(hf["swiglu_alpha"], hf["swiglu_limit"]),
        num_experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )
