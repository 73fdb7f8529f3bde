"""This table says what llama.cpp takes for granted of each architecture.

Source: conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from typing import Any, NamedTuple

from qlora_jax.models import DecoderConfig
from qlora_jax.models.spec import AttentionSpec
from qlora_jax.sources.gguf.keys import (
    CORRECTED,
    DELTA,
    DELTA_MIXTURE,
    GRANITE,
    GRANITE_MIXTURE,
    KEYS,
    LATENT,
    LAYER_NORM_KEYS,
    MAMBA,
    SHARED_SIZE,
    TAPS,
    Key,
    dense_first,
    expert_keys,
    expert_width,
    shared_count,
    shared_size,
)


class Architecture(NamedTuple):
    """What llama.cpp takes for granted of an architecture.

    Attributes:
      model_type: Hugging Face's name of it.
      settings: Settings of config.json that llama.cpp takes for granted: no metadata holds
        them.
      window: The sliding window where no metadata says one, 0 for none; None if the
        architecture has no windows at all.
      largest: Layers of the one size whose scores are scaled by hidden/heads (Gemma).
      scalings: Kinds of rotary scaling it can hold.
      pattern: Where layers have windows, each so many-th has none if no metadata says which.
      windowed: Layers of the one size that has windows; None for any.
      partial: Whether a part of a head may be rotated.
      biases: Whether q, k and v may have biases, as tensors say.
      layer_norm: Whether norms are LayerNorm, with an eps of another name.
      tied: Whether the head is the embedding; None if it may be either.
      mixture: The model type of a file with experts, where that is another one.
      experts: The settings of experts.
      sigmoid: Whether experts are chosen by sigmoids, and not by a softmax; None if it may
        be either.
      optional_norms: The setting that says whether q and k have norms, where tensors alone do.
      more: Further settings.
      rows: Ends of the names of tensors with an axis of size 1 that the file leaves out, and
        the axis.
      counted: Ends of the names of vectors that the file has in two axes, and the field of
        their mixer that is the size of the first.
      hybrid: What layers without attention are called, where some have none.
      latent: Whether attention is latent.
    """

    model_type: str
    settings: dict[str, Any] = {}
    window: int | None = None
    largest: int | None = None
    scalings: tuple[str, ...] = ("linear", "yarn")
    pattern: int | None = None
    windowed: int | None = None
    partial: bool = False
    biases: bool = False
    layer_norm: bool = False
    tied: bool | None = None
    mixture: str | None = None
    experts: tuple[Key, ...] = ()
    sigmoid: bool | None = False
    optional_norms: str | None = None
    more: tuple[Key, ...] = ()
    rows: dict[str, int] = {}
    counted: dict[str, str] = {}
    hybrid: str | None = None
    latent: bool = False


LINEAR = "linear_attention"
_DELTA_ROWS = {"linear_attn.conv1d.weight": 1, "shared_expert_gate.weight": 0}
_FACTORED = ("linear", "yarn", "llama3")
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        scalings=_FACTORED,
        biases=True,
        mixture="mixtral",
        experts=expert_keys("num_local_experts", width=None),
    ),
    "qwen2": Architecture("qwen2", {"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", {"use_sliding_window": False}),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", window=4096, largest=46),
    "gemma3": Architecture("gemma3_text", window=0, largest=62),
    "phi3": Architecture("phi3", window=0, scalings=("longrope",), partial=True),
    "arcee": Architecture("arcee", scalings=_FACTORED),
    "cohere2": Architecture(
        "cohere2", window=4096, pattern=4, layer_norm=True, tied=True
    ),
    "command-r": Architecture(
        "cohere", layer_norm=True, tied=True, optional_norms="use_qk_norm"
    ),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture(
        "exaone4", window=4096, pattern=4, windowed=64, scalings=_FACTORED
    ),
    "glm4": Architecture("glm4", partial=True, biases=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "olmo2": Architecture("olmo2", window=0, pattern=4, tied=False),
    "seed_oss": Architecture("seed_oss", biases=True),
    "granite": Architecture("granite", scalings=_FACTORED, biases=True, more=GRANITE),
    "granitemoe": Architecture(
        "granitemoehybrid",
        scalings=_FACTORED,
        biases=True,
        more=GRANITE,
        experts=GRANITE_MIXTURE,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        {"mamba_conv_bias": True, "mamba_proj_bias": False},
        scalings=_FACTORED,
        biases=True,
        more=(GRANITE[0]._replace(required=False), *GRANITE[1:], *MAMBA),
        experts=GRANITE_MIXTURE,
        rows={"mamba.conv1d.weight": 1},
        counted={
            "mamba.A_log": "heads",
            "mamba.D": "heads",
            "mamba.norm.weight": "groups",
        },
        hybrid=LINEAR,
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {"use_sliding_window": False, "norm_topk_prob": False, "qkv_bias": True},
        experts=expert_keys(
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            SHARED_SIZE,
        ),
        rows={"shared_expert_gate.weight": 0},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {"use_sliding_window": False, "norm_topk_prob": True},
        experts=expert_keys(),
    ),
    "olmoe": Architecture(
        "olmoe", {"norm_topk_prob": False}, experts=expert_keys(width=None), tied=False
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        window=128,
        pattern=2,
        tied=False,
        experts=(
            *expert_keys("num_local_experts", width=None),
            expert_width("intermediate_size"),
        ),
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        experts=expert_keys(
            "moe_num_experts",
            "moe_k",
            "moe_intermediate_size",
            Key("expert_shared_count", "", shared_count, int, False),
            Key(
                "expert_shared_feed_forward_length",
                "moe_num_shared_experts",
                shared_size,
            ),
            Key("leading_dense_block_count", "moe_layer_start_index", dense_first),
            Key("interleave_moe_layer_step", "moe_layer_interval", lambda _: 1),
        ),
        rows={"e_score_correction_bias": 0},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        partial=True,
        biases=True,
        experts=CORRECTED,
        sigmoid=True,
        optional_norms="use_qk_norm",
    ),
    "qwen35": Architecture(
        "qwen3_5_text", partial=True, more=DELTA, rows=_DELTA_ROWS, hybrid=LINEAR
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        partial=True,
        more=DELTA,
        experts=DELTA_MIXTURE,
        rows=_DELTA_ROWS,
        hybrid=LINEAR,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        {"norm_topk_prob": True},
        partial=True,
        more=DELTA,
        experts=DELTA_MIXTURE,
        rows=_DELTA_ROWS,
        hybrid=LINEAR,
    ),
    "lfm2": Architecture(
        "lfm2",
        {"conv_bias": False, "block_auto_adjust_ff_dim": False},
        more=(TAPS,),
        rows={"conv.conv.weight": 1},
        hybrid="conv",
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        {"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        more=(TAPS,),
        rows={"conv.conv.weight": 1},
        hybrid="conv",
        experts=(
            *expert_keys(),
            Key("leading_dense_block_count", "num_dense_layers", dense_first),
        ),
        sigmoid=True,
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": True, "n_group": 1, "topk_group": 1}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        scalings=("yarn",),
        more=LATENT,
        experts=CORRECTED,
        sigmoid=None,
        latent=True,
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        partial=True,
        tied=False,
        experts=(
            *expert_keys("num_local_experts", width=None),
            expert_width("intermediate_size"),
        ),
        sigmoid=True,
    ),
}
QWEN35 = ("qwen35", "qwen35moe")
WRITTEN_AS = {a.model_type: name for name, a in ARCHITECTURES.items()}
WRITTEN_AS |= {"mistral": "llama", "mixtral": "llama", "olmo3": "olmo2"}
WRITTEN_AS |= dict.fromkeys(("deepseek_v2", "kimi_k2", "glm4_moe_lite"), "deepseek2")
"""model_type -> the architecture that a model of it is written as."""


def written_as(kind: str, config: DecoderConfig) -> str | None:
    """Returns the architecture that a model of a model_type is written as; None for none."""
    if kind == "granitemoehybrid" and all(
        isinstance(spec.mixer, AttentionSpec) for spec in config.specs
    ):
        return "granitemoe" if config.num_experts else "granite"
    return WRITTEN_AS.get(kind)


def keys(arch: str, experts: bool) -> tuple[Key, ...]:
    """Returns the settings that files of an architecture hold, with experts or without."""
    known = ARCHITECTURES[arch]
    own = {key.gguf for key in known.more}
    plain = LAYER_NORM_KEYS if known.layer_norm else KEYS
    plain = (*(key for key in plain if key.gguf not in own), *known.more)
    return (*plain, *known.experts) if experts else plain


def model_type(arch: str, experts: bool) -> str:
    """Returns Hugging Face's name of an architecture, with experts or without."""
    known = ARCHITECTURES[arch]
    return known.mixture if experts and known.mixture else known.model_type
