"""GGUF metadata <-> config.json: a decoder's settings as llama.cpp names them.

Names, and what an absent one means, are those of llama.cpp's converter and loader
(conversion/*.py and src/models/*.cpp there). Some settings are no metadata: llama.cpp
takes them for granted of an architecture, so a model that has others cannot be written.
"""

import dataclasses
import logging
import math
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
    KEYS,
    LAYER_NORM_KEYS,
    keys,
    model_type,
    routed,
)
from qlora_jax.sources.gguf.layers import (
    FULL,
    SIGMOID,
    expert_problems,
    hybrid,
    latent_problems,
    olmo3,
    pattern_of,
    read_hybrid,
    read_latent,
    warn_of_latent,
    windows_of,
    yarn_multiplier,
)

logger = logging.getLogger(__name__)

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors that hold rotary settings: what each frequency is divided by."""


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
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if known.optional_norms is not None:
        config[known.optional_norms] = "blk.0.attn_q_norm.weight" in tensors
    # What predicts several tokens is counted as layers, behind the others.
    config["num_hidden_layers"] -= meta.get(f"{arch}.nextn_predict_layers", 0)
    if known.hybrid:
        read_hybrid(config, meta)
    if known.latent:
        read_latent(config, meta)
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
        config["rope_local_base_freq"] = _decimal(local)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := meta.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{key}_token_id"] = token
    problems = _read_rope(config, meta, factors)
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
                config["layer_types"] = [FULL if heads else "conv" for heads in value]
                value = [heads for heads in value if heads] or [0]
            if len(set(value)) > 1:
                problems.append(f"{arch}.{key.gguf} differs between layers: {value}")
            value = value[0]
        if value is not None and value != []:
            if key.hf:
                config[key.hf] = key.kind(_decimal(value))
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


def _decimal(value: Any) -> Any:
    """Returns a float32's shortest decimal, which is what it was made from."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rounded(value: Any) -> Any:
    """Returns a setting with all its floats as a file holds them."""
    if isinstance(value, RopeScaling):
        value = tuple(vars(value).values())
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return np.float32(value) if isinstance(value, float) else value


def _read_rope(
    config: dict[str, Any], meta: dict[str, Any], factors: Mapping[str, np.ndarray]
) -> list[str]:
    """Adds the rotary settings to a config; returns problems."""
    prefix = f"{meta['general.architecture']}.rope."
    rope = {
        key.removeprefix(prefix).removeprefix("scaling."): _decimal(value)
        for key, value in meta.items()
        if key.startswith(prefix)
    }
    dim, kind = (
        rope.get("dimension_count", config["head_dim"]),
        rope.get("type", "none"),
    )
    known = ARCHITECTURES[meta["general.architecture"]]
    if known.partial:
        config["partial_rotary_factor"] = dim / config["head_dim"]
    elif dim != config["head_dim"]:
        return [f"{prefix}dimension_count is {dim}, a part of a head; not supported"]
    original = rope.get(
        "original_context_length", config.get("max_position_embeddings")
    )
    values = {
        name: [_decimal(float(x)) for x in np.ravel(array)]
        for name, array in factors.items()
    }
    for name, array in values.items():
        if len(array) != dim // 2:
            return [f"{name} has {len(array)} factors, expected {dim // 2}"]
        if not all(0 < x <= 1e6 for x in array):
            return [f"{name} has a factor that no frequency is divided by"]
    if FREQS in values:
        config["rope_scaling"] = _llama3(values[FREQS], config["rope_theta"])
    elif LONG in values and SHORT in values:
        config["original_max_position_embeddings"] = original
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": values[SHORT],
            "long_factor": values[LONG],
            "attention_factor": rope.get("attn_factor"),
        }
    elif kind in ("linear", "yarn") and rope.get("factor", 0) not in (0, 1):
        # What llama.cpp multiplies yarn's attention by has changed between its versions.
        # Yarn's own, which is what a file without it is read as.
        own = 0.1 * math.log(max(rope["factor"], 1)) + 1
        if abs(rope.get("yarn_attn_factor", 0) - own) < 1e-4:
            rope.pop("yarn_attn_factor")
        for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if rope.get(key, 1.0) != 1.0:
                return [f"{prefix}scaling.{key} is {rope[key]}; not supported"]
        config["rope_scaling"] = {"rope_type": kind, "factor": rope["factor"]}
        if known.latent:
            dims = _decimal(10 * rope.get("yarn_log_multiplier", 0.0))
            if not dims:
                return [f"{prefix}scaling.yarn_log_multiplier is missing"]
            config["rope_scaling"] |= {"mscale": dims, "mscale_all_dim": dims}
        if kind == "yarn":
            config["rope_scaling"] |= {
                "original_max_position_embeddings": original,
                "beta_fast": rope.get("yarn_beta_fast", 32.0),
                "beta_slow": rope.get("yarn_beta_slow", 1.0),
            }
    elif kind not in ("none", "linear", "yarn", "longrope"):
        return [f"{prefix}scaling.type is {kind!r}; known: linear, yarn, longrope"]
    return []


def _llama3(values: list[float], theta: float) -> dict[str, Any]:
    """Returns the rope_scaling whose frequencies are divided by these factors.

    A frequency of wavelength w is divided by 1 where w < length / high, by `factor` where
    w > length / low, and between by 1 / (s + (1 - s) / factor) with s = (length / w - low)
    / (high - low): a line in 1 / w, so two of them give high and length. low is 1, as in
    every Llama; only its ratio to the others matters. Factors that are made in no such
    way are kept as they are, in the form of LongRoPE.
    """
    factors, largest = np.array(values), max(values)
    dim, plain = 2 * len(factors), inverse_frequencies(2 * len(factors), theta, None)
    middle = (factors > 1.0001) & (factors < largest * 0.9999)
    if middle.sum() >= 2:
        blend = (1 / factors[middle] - 1 / largest) / (1 - 1 / largest)
        turns = np.asarray(plain, np.float64)[middle] / (2 * math.pi)
        slope, start = np.polyfit(turns, blend, 1)
        if not (math.isfinite(slope) and math.isfinite(start)) or 0 in (start, slope):
            return _as_they_are(values)
        scaling = RopeScaling(
            kind="llama3",
            factor=largest,
            high_freq_factor=round(1 - 1 / float(start), 3),
            original_max_position=round(-slope / start),
        )
        made = plain / inverse_frequencies(dim, theta, scaling)
        if np.allclose(np.asarray(made), factors, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    return _as_they_are(values)


def _as_they_are(values: list[float]) -> dict[str, Any]:
    kept = {"short_factor": values, "long_factor": values, "attention_factor": 1.0}
    return {"rope_type": "longrope", "factor": 1.0} | kept
