"""Granite 4: Granite with Mamba 2 in most layers, and experts with a shared feed-forward.

Without experts the shared feed-forward is the only one. Files hold the experts of a layer
together, and the gate and up of each feed-forward too.
"""

from typing import Any

from qlora_jax.models import granite, llama, reading
from qlora_jax.models.fused import Fused
from qlora_jax.models.spec import AttentionSpec, ExpertsSpec, MambaSpec, MLPSpec

MODEL_TYPE = "granitemoehybrid"
_LAYER = "model.layers.{}"
_MAMBA, _SHARED = f"{_LAYER}.mamba", f"{_LAYER}.shared_mlp"
_MOE = f"{_LAYER}.block_sparse_moe"
_GATE_UP, _DOWN = (
    f"{_MOE}.experts.{{}}.{name}.weight" for name in ("gate_up_proj", "down_proj")
)
_COMMON = llama.NAMES | {
    "layers.attn.in_proj.kernel": f"{_MAMBA}.in_proj.weight",
    "layers.attn.in_proj.bias": f"{_MAMBA}.in_proj.bias",
    "layers.attn.conv.weight": f"{_MAMBA}.conv1d.weight",
    "layers.attn.conv.bias": f"{_MAMBA}.conv1d.bias",
    "layers.attn.decay.weight": f"{_MAMBA}.A_log",
    "layers.attn.decay.bias": f"{_MAMBA}.dt_bias",
    "layers.attn.skip.weight": f"{_MAMBA}.D",
    "layers.attn.norm.weight": f"{_MAMBA}.norm.weight",
    "layers.attn.out_proj.kernel": f"{_MAMBA}.out_proj.weight",
    "layers.attn.out_proj.bias": f"{_MAMBA}.out_proj.bias",
}
DENSE_NAMES = _COMMON | {
    "layers.mlp.gate_up_proj.kernel": f"{_SHARED}.input_linear.weight",
    "layers.mlp.down_proj.kernel": f"{_SHARED}.output_linear.weight",
}
NAMES = _COMMON | {
    "layers.mlp.shared.mlp.gate_up_proj.kernel": f"{_SHARED}.input_linear.weight",
    "layers.mlp.shared.mlp.down_proj.kernel": f"{_SHARED}.output_linear.weight",
    "layers.mlp.router.weight": f"{_MOE}.router.layer.weight",
    "layers.mlp.experts.gate_up_proj.kernel": _GATE_UP,
    "layers.mlp.experts.down_proj.kernel": _DOWN,
}
FUSED = (
    Fused(f"{_MOE}.input_linear.weight", (_GATE_UP,)),
    Fused(f"{_MOE}.output_linear.weight", (_DOWN,)),
)
PARAMETERS = (
    Fused(f"{_MOE}.experts.gate_up_proj", (_GATE_UP,)),
    Fused(f"{_MOE}.experts.down_proj", (_DOWN,)),
)
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_LINEAR, _FULL = ("linear_attention", "mamba"), (reading.FULL, "attention")
"""What transformers calls kinds of layers, and once did."""

_ANY_STEP = (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""Forms of a time_step_limit that limits nothing."""


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    count = hf.get("num_hidden_layers") or 0
    types = hf.get("layer_types") or hf.get("layers_block_type")
    types = types or [_LINEAR[0]] * count
    experts, shared = hf["num_local_experts"], hf["shared_intermediate_size"]
    feed_forward: Any = MLPSpec()
    given = {"intermediate_size": shared}
    if experts:
        feed_forward = ExpertsSpec(shared_size=shared)
        given = {"num_experts": experts}
        given["experts_per_token"] = hf["num_experts_per_tok"]
    rotated = hf.get("position_embedding_type") == "rope"
    mamba, attention = _mamba(hf), AttentionSpec(rope="global" if rotated else "none")
    return reading.read(
        hf,
        _problems(hf, types, mamba),
        mixers=[mamba if kind in _LINEAR else attention for kind in types],
        feed_forwards=[feed_forward] * count,
        fused_gate_up=True,
        **granite.multipliers(hf),
        **given,
    )


def _mamba(hf: dict[str, Any]) -> MambaSpec:
    heads, inner = (
        hf["mamba_n_heads"],
        hf["mamba_expand"] * (hf.get("hidden_size") or 0),
    )
    size = hf["mamba_d_head"]
    return MambaSpec(
        heads=heads,
        head_dim=inner // heads if size == "auto" else size,
        state_dim=hf["mamba_d_state"],
        groups=hf["mamba_n_groups"],
        taps=hf["mamba_d_conv"],
        conv_bias=bool(hf["mamba_conv_bias"]),
        bias=bool(hf["mamba_proj_bias"]),
    )


def _problems(hf: dict[str, Any], types: list[str], mamba: MambaSpec) -> list[str]:
    known, older = (_FULL[0], _LINEAR[0]), (_FULL[1], _LINEAR[1])
    count = hf.get("num_hidden_layers") or 0
    problems = reading.kind_problems(types, count, known, older)
    inner = hf["mamba_expand"] * (hf.get("hidden_size") or 0)
    if mamba.inner_size != inner or mamba.heads % mamba.groups:
        problems.append(
            f"mamba_n_heads is {mamba.heads}, mamba_d_head {mamba.head_dim} and "
            f"mamba_n_groups {mamba.groups}; expected heads of {inner} features in all, "
            "which is mamba_expand times hidden_size, and as many heads in each group"
        )
    if not (hf["num_local_experts"] or hf["shared_intermediate_size"]):
        problems.append(
            "num_local_experts and shared_intermediate_size are 0; expected a feed-forward"
        )
    if (limit := hf.get("time_step_limit")) not in _ANY_STEP:
        problems.append(
            f"time_step_limit is {limit!r:.80}; steps are not limited here, expected null"
        )
    if (kind := hf.get("position_embedding_type")) not in (None, "nope", "rope"):
        problems.append(
            f"position_embedding_type is {kind!r:.80}; known: null, nope, rope"
        )
    return problems
