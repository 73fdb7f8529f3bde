"""What llama.cpp takes for granted of each architecture, and what it calls their settings.

Source: conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_jax.models import DecoderConfig
from qlora_jax.models.spec import (
    DeltaSpec,
    ExpertsSpec,
    LatentSpec,
    MLPSpec,
    ShortConvSpec,
)


class Key(NamedTuple):
    """A setting's names in GGUF and in config.json, and where DecoderConfig has it.

    Attributes:
      gguf, hf: Its names.
      field: A field of DecoderConfig, or what returns the value.
      kind: Its type.
      required: Whether a file has to have it.
    """

    gguf: str
    hf: str
    field: str | Callable[[DecoderConfig], Any]
    kind: type = int
    required: bool = True

    def value(self, config: DecoderConfig) -> Any:
        """Returns the setting of a decoder; None where it has none."""
        if isinstance(self.field, str):
            return getattr(config, self.field)
        return self.field(config)


def _width(config: DecoderConfig) -> int:
    """Returns the width of the layers without experts; that of experts where all have some."""
    found = [
        s.feed_forward for s in config.specs if isinstance(s.feed_forward, MLPSpec)
    ]
    widths = [one.intermediate_size for one in found if one.intermediate_size]
    return [*widths, config.intermediate_size][0]


def routed(config: DecoderConfig) -> ExpertsSpec:
    """Returns the first mixture of a decoder that has one."""
    return next(
        spec.feed_forward
        for spec in config.specs
        if isinstance(spec.feed_forward, ExpertsSpec)
    )


def _dense_first(config: DecoderConfig) -> int:
    """Returns how many layers are before the first with experts."""
    return [s.feed_forward for s in config.specs].index(routed(config))


def _mixer(kind: type, field: str) -> Callable[[DecoderConfig], Any]:
    """Returns what reads a field of a decoder's first mixer of a kind."""

    def value(config: DecoderConfig) -> Any:
        mixers = (spec.mixer for spec in config.specs)
        return getattr(next(one for one in mixers if isinstance(one, kind)), field)

    return value


def _shared_size(config: DecoderConfig) -> int:
    return routed(config).shared_size


def _shared_count(config: DecoderConfig) -> int:
    return routed(config).shared_size // config.intermediate_size


def _experts(
    count: str = "num_experts",
    used: str = "num_experts_per_tok",
    width: str | None = "moe_intermediate_size",
    *more: Key,
) -> tuple[Key, ...]:
    """Returns the settings of experts.

    Args:
      count, used, width: What config.json calls the number of experts, those of a token, and
        their width; None where that is feed_forward_length.
      more: The others.
    """
    made = Key("expert_count", count, "num_experts")
    taken = Key("expert_used_count", used, "experts_per_token")
    wide = () if width is None else (_expert_width(width),)
    return made, taken, *wide, *more


def _expert_width(hf: str) -> Key:
    return Key("expert_feed_forward_length", hf, "intermediate_size", int, False)


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
      hybrid: Whether some layers have no attention.
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
    hybrid: bool = False
    latent: bool = False


_GRANITE = (
    Key("logit_scale", "logits_scaling", lambda config: 1 / config.logit_scale, float),
    *(
        Key(f"{part}_scale", f"{part}_multiplier", f"{part}_scale", float, False)
        for part in ("residual", "embedding")
    ),
    Key("attention.scale", "attention_multiplier", "attention_scale", float, False),
)
_CORRECTED = _experts(
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    Key("expert_shared_count", "n_shared_experts", _shared_count),
    Key("leading_dense_block_count", "first_k_dense_replace", _dense_first),
    Key(
        "expert_weights_scale",
        "routed_scaling_factor",
        lambda config: routed(config).scale,
        float,
        False,
    ),
    Key("expert_weights_norm", "norm_topk_prob", "normalize_experts", bool, False),
    Key(
        "expert_group_count",
        "n_group",
        lambda config: routed(config).groups,
        int,
        False,
    ),
    Key(
        "expert_group_used_count",
        "topk_group",
        lambda config: routed(config).top_groups,
        int,
        False,
    ),
)
"""Those of experts whose choice is corrected, in DeepSeek's names."""


def _latent_head(config: DecoderConfig) -> int:
    """Returns the size of a head before keys are made of the small vectors."""
    return _mixer(LatentSpec, "latent_rank")(config) + (config.rotary_dim or 0)


_LATENT = (
    Key("attention.head_count_kv", "", lambda _: 1, int, False),
    Key("attention.key_length", "", _latent_head, int, False),
    Key("attention.value_length", "", _mixer(LatentSpec, "latent_rank"), int, False),
    Key("attention.key_length_mla", "head_dim", "head_dim"),
    Key("attention.value_length_mla", "v_head_dim", _mixer(LatentSpec, "value_dim")),
    Key("attention.kv_lora_rank", "kv_lora_rank", _mixer(LatentSpec, "latent_rank")),
    Key(
        "attention.q_lora_rank",
        "q_lora_rank",
        _mixer(LatentSpec, "query_rank"),
        int,
        False,
    ),
)
_DELTA = tuple(
    Key(f"ssm.{gguf}", f"linear_{hf}", _mixer(DeltaSpec, field))
    for gguf, hf, field in (
        ("conv_kernel", "conv_kernel_dim", "taps"),
        ("state_size", "key_head_dim", "key_dim"),
        ("group_count", "num_key_heads", "key_heads"),
        ("time_step_rank", "num_value_heads", "value_heads"),
        ("inner_size", "value_head_dim", "value_size"),  # of all heads
    )
)
_SHARED_SIZE = Key(
    "expert_shared_feed_forward_length",
    "shared_expert_intermediate_size",
    _shared_size,
)
_DELTA_MIXTURE = _experts(
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    _SHARED_SIZE,
)
_DELTA_ROWS = {"linear_attn.conv1d.weight": 1, "shared_expert_gate.weight": 0}
_TAPS = Key("shortconv.l_cache", "conv_L_cache", _mixer(ShortConvSpec, "taps"))
_FACTORED = ("linear", "yarn", "llama3")
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        scalings=_FACTORED,
        biases=True,
        mixture="mixtral",
        experts=_experts("num_local_experts", width=None),
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
    "granite": Architecture("granite", scalings=_FACTORED, more=_GRANITE),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {"use_sliding_window": False, "norm_topk_prob": False, "qkv_bias": True},
        experts=_experts(
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            _SHARED_SIZE,
        ),
        rows={"shared_expert_gate.weight": 0},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {"use_sliding_window": False, "norm_topk_prob": True},
        experts=_experts(),
    ),
    "olmoe": Architecture(
        "olmoe", {"norm_topk_prob": False}, experts=_experts(width=None), tied=False
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        window=128,
        pattern=2,
        tied=False,
        experts=(
            *_experts("num_local_experts", width=None),
            _expert_width("intermediate_size"),
        ),
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        experts=_experts(
            "moe_num_experts",
            "moe_k",
            "moe_intermediate_size",
            Key("expert_shared_count", "", _shared_count, int, False),
            Key(
                "expert_shared_feed_forward_length",
                "moe_num_shared_experts",
                _shared_size,
            ),
            Key("leading_dense_block_count", "moe_layer_start_index", _dense_first),
            Key("interleave_moe_layer_step", "moe_layer_interval", lambda _: 1),
        ),
        rows={"e_score_correction_bias": 0},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        partial=True,
        biases=True,
        experts=_CORRECTED,
        sigmoid=True,
        optional_norms="use_qk_norm",
    ),
    "qwen35": Architecture(
        "qwen3_5_text", partial=True, more=_DELTA, rows=_DELTA_ROWS, hybrid=True
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        partial=True,
        more=_DELTA,
        experts=_DELTA_MIXTURE,
        rows=_DELTA_ROWS,
        hybrid=True,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        {"norm_topk_prob": True},
        partial=True,
        more=_DELTA,
        experts=_DELTA_MIXTURE,
        rows=_DELTA_ROWS,
        hybrid=True,
    ),
    "lfm2": Architecture(
        "lfm2",
        {"conv_bias": False, "block_auto_adjust_ff_dim": False},
        more=(_TAPS,),
        rows={"conv.conv.weight": 1},
        hybrid=True,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        {"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        more=(_TAPS,),
        rows={"conv.conv.weight": 1},
        hybrid=True,
        experts=(
            *_experts(),
            Key("leading_dense_block_count", "num_dense_layers", _dense_first),
        ),
        sigmoid=True,
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": True, "n_group": 1, "topk_group": 1}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        scalings=("yarn",),
        more=_LATENT,
        experts=_CORRECTED,
        sigmoid=None,
        latent=True,
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        partial=True,
        tied=False,
        experts=(
            *_experts("num_local_experts", width=None),
            _expert_width("intermediate_size"),
        ),
        sigmoid=True,
    ),
}
QWEN35 = ("qwen35", "qwen35moe")
WRITTEN_AS = {a.model_type: name for name, a in ARCHITECTURES.items()}
WRITTEN_AS |= {"mistral": "llama", "mixtral": "llama", "olmo3": "olmo2"}
WRITTEN_AS |= dict.fromkeys(("deepseek_v2", "kimi_k2", "glm4_moe_lite"), "deepseek2")
"""model_type -> the architecture that a model of it is written as."""


KEYS = (
    Key("embedding_length", "hidden_size", "hidden_size"),
    Key("block_count", "num_hidden_layers", "num_layers"),
    Key("feed_forward_length", "intermediate_size", _width, int, False),
    Key("attention.head_count", "num_attention_heads", "num_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "rms_norm_eps", float),
    Key(
        "context_length",
        "max_position_embeddings",
        "max_position_embeddings",
        required=False,
    ),
    Key("attention.head_count_kv", "num_key_value_heads", "num_kv_heads", int, False),
    Key("attention.key_length", "head_dim", "head_dim", int, False),
    Key("rope.freq_base", "rope_theta", "rope_theta", float, False),
    *(
        Key(
            f"{part}_logit_softcapping",
            f"{part}_logit_softcapping",
            field,
            float,
            False,
        )
        for part, field in (("attn", "attention_softcap"), ("final", "logit_softcap"))
    ),
)
LAYER_NORM_KEYS = (
    *(key for key in KEYS if key.hf != "rms_norm_eps"),
    Key("attention.layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", float),
    Key("logit_scale", "logit_scale", "logit_scale", float),
)


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
