"""Qwen3.5 (3.6, 3.8), dense, text: three layers of a gated delta net to one of attention.

Attention has a gate, norms on q and k, and rotates a quarter of a head. Norms are stored as
their difference from 1, but for the delta net's own. Folders have it inside of a multimodal
model (wrappers.py).
"""

from typing import Any

from qlora_jax.models import llama, reading
from qlora_jax.models.spec import AttentionSpec, DeltaSpec

MODEL_TYPE = "qwen3_5_text"
_DELTA = "model.layers.{}.linear_attn"
NAMES = (
    llama.NAMES
    | llama.QK_NORM
    | {
        "layers.attn.in_proj_qkv.kernel": f"{_DELTA}.in_proj_qkv.weight",
        "layers.attn.in_proj_z.kernel": f"{_DELTA}.in_proj_z.weight",
        "layers.attn.in_proj_b.kernel": f"{_DELTA}.in_proj_b.weight",
        "layers.attn.in_proj_a.kernel": f"{_DELTA}.in_proj_a.weight",
        "layers.attn.conv.weight": f"{_DELTA}.conv1d.weight",
        "layers.attn.decay.weight": f"{_DELTA}.A_log",
        "layers.attn.decay.bias": f"{_DELTA}.dt_bias",
        "layers.attn.norm.weight": f"{_DELTA}.norm.weight",
        "layers.attn.out_proj.kernel": f"{_DELTA}.out_proj.weight",
    }
)
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_LINEAR = ("linear_attention", "mamba")  # what transformers calls it, and once did


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return read_hybrid(with_defaults(hf, DEFAULTS))


def with_defaults(hf: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with a family's own defaults in the place of what is null."""
    return own | {k: v for k, v in hf.items() if v is not None or k not in own}


def read_hybrid(
    hf: dict[str, Any], *, fused: bool = False, **given: Any
) -> reading.Read:
    """Reads what families share that have delta nets and gated attention.

    Args:
      hf: The object of config.json, with defaults.
      fused: Whether the delta net's linears are fused, as DeltaSpec has it.
      **given: More of what `reading.read` takes.
    """
    layers, every = hf.get("num_hidden_layers") or 0, hf["full_attention_interval"]
    types = hf.get("layer_types")
    if types is None:
        types = [_LINEAR[0] if (i + 1) % every else reading.FULL for i in range(layers)]
    known = reading.FULL, _LINEAR[0]
    problems = reading.kind_problems(types, layers, known, _LINEAR[1:])
    delta = DeltaSpec(
        key_heads=hf["linear_num_key_heads"],
        value_heads=hf["linear_num_value_heads"],
        key_dim=hf["linear_key_head_dim"],
        value_dim=hf["linear_value_head_dim"],
        taps=hf["linear_conv_kernel_dim"],
        fused=fused,
    )
    if delta.value_heads % delta.key_heads:
        problems.append(
            f"linear_num_value_heads is {delta.value_heads}, expected a multiple of "
            f"linear_num_key_heads, which is {delta.key_heads}"
        )
    return reading.read(
        hf,
        problems,
        partial_rotary=True,
        mixers=[delta if kind in _LINEAR else AttentionSpec() for kind in types],
        norm_offset=1.0,
        qk_norm="head",
        attention_gate=True,
        **given,
    )
