"""These tables say what llama.cpp calls settings, what config.json does, and where a decoder
has them.

Source: conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_jax.models import DecoderConfig
from qlora_jax.models.spec import (
    DeltaSpec,
    ExpertsSpec,
    LatentSpec,
    MambaSpec,
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


def dense_first(config: DecoderConfig) -> int:
    """Returns how many layers are before the first with experts."""
    return [s.feed_forward for s in config.specs].index(routed(config))


def _mixer(kind: type, field: str) -> Callable[[DecoderConfig], Any]:
    """Returns what reads a field of a decoder's first mixer of a kind."""

    def value(config: DecoderConfig) -> Any:
        mixers = (spec.mixer for spec in config.specs)
        return getattr(next(one for one in mixers if isinstance(one, kind)), field)

    return value


def shared_size(config: DecoderConfig) -> int:
    """Returns the width of what all tokens take beside experts."""
    return routed(config).shared_size


def shared_count(config: DecoderConfig) -> int:
    """Returns how many experts wide it is."""
    return routed(config).shared_size // config.intermediate_size


def expert_keys(
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
    wide = () if width is None else (expert_width(width),)
    return made, taken, *wide, *more


def expert_width(hf: str) -> Key:
    """Returns the setting of experts' width, which config.json has under this name."""
    return Key("expert_feed_forward_length", hf, "intermediate_size", int, False)


def _recurrent(kind: type, *settings: tuple[str, str]) -> tuple[Key, ...]:
    """Returns the settings of a recurrent mixer, of which llama.cpp has five.

    Args:
      kind: The class of its spec.
      settings: What config.json calls each, and the spec's field, in the order of _STATE.
    """
    return tuple(
        Key(f"ssm.{gguf}", hf, _mixer(kind, field))
        for gguf, (hf, field) in zip(_STATE, settings, strict=True)
    )


_STATE = ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")
"""The settings of a recurrent mixer are called so in every architecture."""
GRANITE = (
    Key("logit_scale", "logits_scaling", lambda config: 1 / config.logit_scale, float),
    *(
        Key(f"{part}_scale", f"{part}_multiplier", f"{part}_scale", float, False)
        for part in ("residual", "embedding")
    ),
    Key("attention.scale", "attention_multiplier", "attention_scale", float, False),
)
MAMBA = _recurrent(
    MambaSpec,
    *(("mamba_d_conv", "taps"), ("mamba_d_state", "state_dim")),
    *(("mamba_n_groups", "groups"), ("mamba_n_heads", "heads")),
    ("mamba_expand", "inner_size"),  # and not how often hidden_size
)
GRANITE_MIXTURE = expert_keys(
    "num_local_experts",
    "num_experts_per_tok",
    None,
    Key(
        "expert_shared_feed_forward_length",
        "shared_intermediate_size",
        shared_size,
        int,
        False,
    ),
)
CORRECTED = expert_keys(
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    Key("expert_shared_count", "n_shared_experts", shared_count),
    Key("leading_dense_block_count", "first_k_dense_replace", dense_first),
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


LATENT = (
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
DELTA = _recurrent(
    DeltaSpec,
    *(("linear_conv_kernel_dim", "taps"), ("linear_key_head_dim", "key_dim")),
    *(("linear_num_key_heads", "key_heads"), ("linear_num_value_heads", "value_heads")),
    ("linear_value_head_dim", "value_size"),  # of all heads
)
SHARED_SIZE = Key(
    "expert_shared_feed_forward_length",
    "shared_expert_intermediate_size",
    shared_size,
)
DELTA_MIXTURE = expert_keys(
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    SHARED_SIZE,
)
TAPS = Key("shortconv.l_cache", "conv_L_cache", _mixer(ShortConvSpec, "taps"))

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
