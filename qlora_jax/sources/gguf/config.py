"""GGUF metadata <-> config.json: a decoder's settings as llama.cpp names them.

Names, and what an absent one means, are those of llama.cpp's converter and loader
(conversion/*.py and src/models/*.cpp there). Some settings are no metadata: llama.cpp
takes them for granted of an architecture, so a model that has others cannot be written.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qlora_jax.models import DecoderConfig, read_config
from qlora_jax.models.settings import MAX_LAYERS, MAX_ROWS
from qlora_jax.nn.rope import Rope, RopeScaling, inverse_frequencies
from qlora_jax.schema import (
    FINITE,
    FLAG,
    TEXT,
    Kind,
    either,
    listed,
    misfits,
    number,
    whole,
)
from qlora_jax.sources.gguf.architectures import (
    ARCHITECTURES,
    keys,
    model_type,
)
from qlora_jax.sources.gguf.keys import KEYS, LAYER_NORM_KEYS, routed
from qlora_jax.sources.gguf.layers import (
    FULL,
    GRANITE_4,
    SIGMOID,
    expert_problems,
    granite,
    granite_problems,
    hybrid,
    latent_problems,
    olmo3,
    pattern_of,
    read_granite,
    read_hybrid,
    read_latent,
    warn_of_latent,
    windows_of,
    yarn_multiplier,
)
from qlora_jax.sources.gguf.rope import FREQS, LONG, SHORT, decimal, read_rope

logger = logging.getLogger(__name__)


_ID = whole(0, 2**31 - 1)
_FLAG = either(FLAG, whole(0, 1))
_KINDS: dict[str, Kind] = {
    "general.architecture": TEXT,
    "split.count": whole(0, 2**16),
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": listed(TEXT, MAX_ROWS),
    "tokenizer.ggml.token_type": listed(_ID, MAX_ROWS),
    "tokenizer.ggml.merges": listed(TEXT, MAX_ROWS),
    "tokenizer.ggml.scores": listed(FINITE, MAX_ROWS),
    "tokenizer.chat_template": TEXT,
    **{
        f"tokenizer.ggml.{name}_token_id": _ID
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom")
    },
    **{
        f"tokenizer.ggml.add_{name}": _FLAG
        for name in ("bos_token", "eos_token", "space_prefix")
    },
}
"""Metadata of all architectures -> their kinds."""

_COUNT = whole(0, 2**31 - 1)
_KIND_OF = {int: _COUNT, float: FINITE, bool: _FLAG}
_OF_ARCHITECTURE: dict[str, Kind] = {
    **{
        key.gguf: either(kind, listed(kind, MAX_LAYERS))
        for key in {
            *KEYS,
            *LAYER_NORM_KEYS,
            *(key for a in ARCHITECTURES.values() for key in (*a.more, *a.experts)),
        }
        for kind in (_KIND_OF[key.kind],)
    },
    "expert_gating_func": whole(0, 15),
    "nextn_predict_layers": _COUNT,
    "attention.sliding_window": _COUNT,
    "attention.sliding_window_pattern": either(_COUNT, listed(_FLAG, MAX_LAYERS)),
    "attention.recurrent_layers": listed(_FLAG, MAX_LAYERS),
    "full_attention_interval": whole(1, MAX_LAYERS),
    "rope.dimension_sections": listed(_COUNT, 4),
    "rope.freq_base_swa": number(1, 1e12),
    "rope.dimension_count": whole(2, 2**13),
    "rope.scaling.type": TEXT,
    "rope.scaling.finetuned": _FLAG,
    "rope.scaling.original_context_length": _COUNT,
    **{
        f"rope.scaling.{name}": FINITE
        for name in (
            *("factor", "attn_factor", "yarn_attn_factor", "yarn_ext_factor"),
            *("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"),
        )
    },
}
"""Metadata with the name of its architecture before it -> their kinds."""


def misfitting(meta: dict[str, Any]) -> list[str]:
    """Returns a sentence for each of a file's metadata that cannot be what it is."""
    problems = misfits(meta, _KINDS)
    arch = meta.get("general.architecture")
    if not isinstance(arch, str):
        return problems
    own = {
        key: value
        for name, value in meta.items()
        if (key := name.removeprefix(f"{arch}.")) != name and value != []
    }
    return problems + misfits(own, _OF_ARCHITECTURE, within=f"{arch}.")


def read(
    meta: dict[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, np.ndarray],
    vocab_size: int,
) -> tuple[dict[str, Any], list[str]]:
    """Returns what config.json would say, and problems.

    Args:
      meta: All metadata; its general.architecture is a known one.
      tensors: Names in the file.
      factors: Those of FREQS, LONG and SHORT that there are.
      vocab_size: Rows of the embedding.
    """
    arch, problems = meta["general.architecture"], []
    known, experts = ARCHITECTURES[arch], bool(meta.get(f"{arch}.expert_count"))
    config: dict[str, Any] = {"model_type": model_type(arch, experts)} | known.settings
    problems += expert_problems(meta, known) if experts else []
    problems += _read_keys(config, meta, experts)
    if problems:
        return config, problems
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if not heads:
        return config, [f"{arch}.attention.head_count is 0"]
    config = {
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensors,
    } | config
    if known.biases:
        config["attention_bias"] = any(one.endswith("attn_q.bias") for one in tensors)
    if known.optional_norms is not None:
        config[known.optional_norms] = "blk.0.attn_q_norm.weight" in tensors
    # What predicts several tokens is counted as layers, behind the others.
    config["num_hidden_layers"] -= meta.get(f"{arch}.nextn_predict_layers", 0)
    if known.hybrid:
        read_hybrid(config, meta)
    if known.latent:
        read_latent(config, meta)
    if arch.startswith("granite"):
        read_granite(config, meta)
    if arch == "ernie4_5-moe":
        config["moe_num_shared_experts"] //= max(config["moe_intermediate_size"], 1)
    if known.largest is not None:
        largest = config["num_hidden_layers"] == known.largest
        scale = hidden // heads if largest else config["head_dim"]
        config["query_pre_attn_scalar"] = scale
    if known.window is not None:
        config |= windows_of(meta, known, config["num_hidden_layers"])
    if arch == "gemma3":
        config["sliding_window_pattern"] = 6 if config["sliding_window"] else 1
        local = meta.get("gemma3.rope.freq_base_swa", 10000.0)
        config["rope_local_base_freq"] = decimal(local)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := meta.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{key}_token_id"] = token
    problems = read_rope(config, meta, factors)
    if arch == "olmo2" and config["sliding_window"]:
        config = olmo3(config)
    if arch == "gpt-oss":  # without one it would be that of the released models
        plain = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        config["rope_scaling"] = config.get("rope_scaling", plain) | {"truncate": False}
    return config, problems or read_config(config)[1]


def _read_keys(
    config: dict[str, Any], meta: dict[str, Any], experts: bool
) -> list[str]:
    """Adds the settings that have a key of their own; returns problems."""
    arch, problems = meta["general.architecture"], []
    known = ARCHITECTURES[arch]
    for key in keys(arch, experts):
        value = meta.get(f"{arch}.{key.gguf}")
        if isinstance(value, list) and value:  # one a layer
            if known.hybrid and key.hf == "num_key_value_heads":
                config["layer_types"] = [
                    FULL if heads else known.hybrid for heads in value
                ]
                value = [heads for heads in value if heads] or [0]
            if len(set(value)) > 1:
                problems.append(f"{arch}.{key.gguf} differs between layers: {value}")
            value = value[0]
        if value is not None and value != []:
            if key.hf:
                config[key.hf] = key.kind(decimal(value))
        elif key.required:
            problems.append(f"{arch}.{key.gguf} is missing")
    if "intermediate_size" not in config:
        if "moe_intermediate_size" in config:
            config["intermediate_size"] = config["moe_intermediate_size"]
        else:
            problems.append(f"{arch}.feed_forward_length is missing")
    return problems


def write(
    config: DecoderConfig, arch: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a decoder's metadata, and the tensors that hold rotary settings."""
    known = ARCHITECTURES[arch]
    values: dict[str, Any] = {"attention.value_length": config.head_dim}
    values |= {
        key.gguf: key.kind(value)
        for key in keys(arch, bool(config.num_experts))
        if (value := key.value(config)) is not None
    }
    if known.hybrid:
        values |= hybrid(config, arch)
    if config.model_type == GRANITE_4:
        values |= granite(config)
    if config.num_experts and routed(config).score == "sigmoid":
        values["expert_gating_func"] = SIGMOID
    dim = config.rotary_dim or config.head_dim
    if known.latent:
        warn_of_latent(config)
    values["vocab_size"] = config.vocab_size
    values["rope.dimension_count"] = dim
    if known.window is not None:
        windows = [spec.mixer.window or 0 for spec in config.specs]
        values["attention.sliding_window"] = max(windows)
        if arch == "phi3" and any(windows):
            logger.warning(
                "llama.cpp reads the window of %d tokens of a phi3 and attends without it: "
                "longer texts come out otherwise there",
                max(windows),
            )
        every = known.pattern
        if every and [bool(w) for w in windows] != pattern_of(every, len(windows)):
            values["attention.sliding_window_pattern"] = [bool(w) for w in windows]
    if arch == "gemma3":
        ropes = [spec.mixer.rope for spec in config.specs]
        local = next((rope for rope in ropes if isinstance(rope, Rope)), None)
        values["rope.freq_base_swa"] = local.theta if local else 10000.0
    scaling, factors = config.rope_scaling, {}
    kind = scaling.kind if scaling and scaling.kind in known.scalings else None
    if scaling and kind == "llama3":
        plain = inverse_frequencies(dim, config.rope_theta, None)
        made = inverse_frequencies(dim, config.rope_theta, scaling)
        factors[FREQS] = np.asarray(plain / made, np.float32)
    elif scaling and kind is not None:
        length = scaling.original_max_position
        more: dict[str, Any] = {"type": kind, "factor": float(scaling.factor)}
        if kind == "yarn":  # its betas are read of none of these architectures
            more["original_context_length"] = length
            if known.latent and (all_dims := yarn_multiplier(config)) is not None:
                more["yarn_log_multiplier"] = 0.1 * all_dims
        if kind == "longrope":
            attention = float(scaling.attention_factor)
            more = {
                "type": kind,
                "original_context_length": length,
                "attn_factor": attention,
            }
            factors[LONG] = np.asarray(scaling.long_factor, np.float32)
            factors[SHORT] = np.asarray(scaling.short_factor, np.float32)
        values |= {f"rope.scaling.{key}": value for key, value in more.items()}
    meta = {f"{arch}.{key}": value for key, value in values.items()}
    return {"general.architecture": arch} | meta, factors


def lost(
    config: DecoderConfig,
    meta: dict[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, np.ndarray],
) -> list[str]:
    """Returns what of a decoder is not as these metadata say."""
    source, problems = read(meta, tensors, factors, config.vocab_size)
    have, _ = read_config(source)
    if problems or have is None:
        return problems
    arch = meta["general.architecture"]
    if ARCHITECTURES[arch].tied not in (None, config.tie_word_embeddings):
        tied = config.tie_word_embeddings
        problems.append(
            f"tie_word_embeddings is {tied}; no {arch} of llama.cpp has it so"
        )
    if ARCHITECTURES[arch].latent:
        problems += latent_problems(config)
    if config.model_type == GRANITE_4 and (more := granite_problems(config, arch)):
        return problems + more
    if arch == "olmoe" and config.num_kv_heads != config.num_heads:
        problems.append(
            f"num_key_value_heads is {config.num_kv_heads}; an olmoe of llama.cpp has as many "
            f"as heads, {config.num_heads}"
        )
    pairs = [
        (field.name, getattr(config, field.name), getattr(have, field.name))
        for field in dataclasses.fields(config)
        if field.compare
    ]
    return problems + [
        f"{name} is {ours!r}; llama.cpp would take {theirs!r}"
        for name, ours, theirs in pairs
        if _rounded(ours) != _rounded(theirs)
    ]


def _rounded(value: Any) -> Any:
    """Returns a setting with all its floats as a file holds them."""
    if isinstance(value, RopeScaling):
        value = tuple(vars(value).values())
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return np.float32(value) if isinstance(value, float) else value
