"""The metadata of a GGUF file say how layers differ: in windows, mixers and experts."""

import logging
import math
from typing import Any

from qlora_jax.models import DecoderConfig
from qlora_jax.models.spec import AttentionSpec, MambaSpec
from qlora_jax.sources.gguf.architectures import LINEAR, QWEN35, Architecture
from qlora_jax.sources.gguf.keys import routed

logger = logging.getLogger(__name__)

FULL = "full_attention"
GRANITE_4 = "granitemoehybrid"
_ROTATED = "rope.scaling.finetuned"
"""Files of Granite say by this whether queries and keys are rotated."""
LATENT_EPS = 1e-6
"""transformers adds this number to the variance of small vectors of latent attention, whatever
the config's rms_norm_eps is."""
SIGMOID = 2
"""expert_gating_func of experts that are chosen by sigmoids; other values are a softmax."""


def windows_of(
    meta: dict[str, Any], known: Architecture, layers: int
) -> dict[str, Any]:
    """Returns the settings of config.json that say which layers have windows."""
    prefix = f"{meta['general.architecture']}.attention.sliding_window"
    window = meta.get(prefix, known.window)
    if known.windowed is not None:
        window = (window or known.window) if layers == known.windowed else 0
    settings: dict[str, Any] = {"sliding_window": window or None}
    if window and known.pattern is not None:
        pattern = meta.get(f"{prefix}_pattern", known.pattern)
        if isinstance(pattern, int):
            pattern = pattern_of(pattern, layers)
        kinds = (FULL, "sliding_attention")
        settings["layer_types"] = [kinds[bool(here)] for here in pattern]
    return settings


def pattern_of(every: int, layers: int) -> list[bool]:
    """Returns which layers have windows if each so many-th has none; 0 for all."""
    return [not every or (i + 1) % every != 0 for i in range(layers)]


def read_hybrid(config: dict[str, Any], meta: dict[str, Any]) -> None:
    """Adds which layers have attention, and what the others are."""
    arch, count = meta["general.architecture"], config["num_hidden_layers"]
    if arch.startswith("lfm2"):  # its key-value heads say it
        config["norm_eps"] = config["rms_norm_eps"]
    if not arch.startswith("qwen3"):
        return
    heads = max(config["linear_num_value_heads"], 1)
    config["linear_value_head_dim"] //= heads
    every = meta.get(f"{arch}.full_attention_interval", 4)
    turns = [bool((i + 1) % every) for i in range(count)]
    recurrent = meta.get(f"{arch}.attention.recurrent_layers") or turns
    kinds = (FULL, LINEAR)
    config["layer_types"] = [kinds[bool(one)] for one in recurrent[:count]]


def hybrid(config: DecoderConfig, arch: str) -> dict[str, Any]:
    """Returns the settings that say which layers have attention."""
    attends = [isinstance(spec.mixer, AttentionSpec) for spec in config.specs]
    if not arch.startswith("qwen3"):
        heads = [config.num_kv_heads * here for here in attends]
        return {"attention.head_count_kv": heads}
    values: dict[str, Any] = {
        "attention.recurrent_layers": [not here for here in attends]
    }
    if True in attends:
        every = attends.index(True) + 1
        if attends == [(i + 1) % every == 0 for i in range(len(attends))]:
            values["full_attention_interval"] = every
    if arch in QWEN35:  # positions in pictures, which in a text are all the same
        pairs = (config.rotary_dim or config.head_dim) // 2
        thirds = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
        values["rope.dimension_sections"] = [*thirds, 0]
    return values


def read_granite(config: dict[str, Any], meta: dict[str, Any]) -> None:
    """Adds what a file of Granite leaves to its architecture, which has layers of Granite 4
    where it says whether these are rotated."""
    arch, experts = meta["general.architecture"], config.get("num_local_experts", 0)
    own = {"attention": max(config["head_dim"], 1) ** -0.5}
    for name in ("attention", "residual", "embedding"):
        if not config.get(f"{name}_multiplier"):
            config[f"{name}_multiplier"] = own.get(name, 1.0)
    if arch == "granitehybrid" and not config.get("logits_scaling"):
        config["logits_scaling"] = 1.0
    rotated = meta.get(f"{arch}.{_ROTATED}")
    if rotated is None and arch == "granite":
        return
    config["model_type"] = GRANITE_4
    rotated = rotated in (None, True, 1) or arch == "granitemoe"
    config["position_embedding_type"] = "rope" if rotated else "nope"
    config.setdefault("layer_types", [FULL] * config["num_hidden_layers"])
    width = 0 if experts else config["intermediate_size"]
    config["num_local_experts"] = experts
    config.setdefault("shared_intermediate_size", width)
    if "mamba_expand" in config:
        inner, hidden = config["mamba_expand"], max(config["hidden_size"], 1)
        config["mamba_d_head"] = inner // max(config["mamba_n_heads"], 1)
        config["mamba_expand"] = inner // hidden
    else:  # of no layer, but transformers has it divide a number
        config["mamba_n_heads"] = 1


def granite(config: DecoderConfig) -> dict[str, Any]:
    """Returns the setting that says whether a Granite 4 is rotated."""
    ropes = [getattr(spec.mixer, "rope", None) for spec in config.specs]
    return {_ROTATED: "none" not in ropes}


def granite_problems(config: DecoderConfig, arch: str) -> list[str]:
    """Returns what of a Granite 4 llama.cpp has otherwise."""
    problems = []
    if arch == "granitemoe" and not granite(config)[_ROTATED]:
        problems.append(
            "position_embedding_type is not rope; llama.cpp rotates a Granite that has "
            "experts and attention in all layers"
        )
    mixers = (spec.mixer for spec in config.specs)
    spec = next((one for one in mixers if isinstance(one, MambaSpec)), None)
    if spec is None:
        return problems
    wanted = {
        "mamba_expand": (spec.inner_size // config.hidden_size, 2),
        "mamba_conv_bias": (spec.conv_bias, True),
        "mamba_proj_bias": (spec.bias, False),
    }
    return problems + [
        f"{name} is {ours}; llama.cpp would take {theirs}"
        for name, (ours, theirs) in wanted.items()
        if ours != theirs
    ]


def expert_problems(meta: dict[str, Any], known: Architecture) -> list[str]:
    """Returns what llama.cpp would do with experts that models of an architecture do not."""
    arch, problems = meta["general.architecture"], []
    if not known.experts:
        return ["it is a mixture of experts; without experts alone is it read"]
    read_here = {key.gguf for key in known.experts}
    plain = {"expert_weights_scale": (0, 1), "expert_group_count": (0, 1)}
    for name, values in plain.items():
        value = meta.get(f"{arch}.{name}", 0)
        if name not in read_here and value not in values:
            problems.append(f"{arch}.{name} is {value}, and no {arch} has any")
    gating = meta.get(f"{arch}.expert_gating_func", 0)
    if known.sigmoid is not None and gating and (gating == SIGMOID) != known.sigmoid:
        wanted = "a sigmoid" if known.sigmoid else "a softmax"
        problems.append(f"{arch}.expert_gating_func is {gating}; expected {wanted}")
    return problems


def read_latent(config: dict[str, Any], meta: dict[str, Any]) -> None:
    """Adds the sizes of latent attention, and how experts are chosen beside it."""
    arch = meta["general.architecture"]
    rotated = meta.get(f"{arch}.rope.dimension_count", 0)
    config["num_key_value_heads"] = config["num_attention_heads"]
    config["qk_rope_head_dim"] = rotated
    config["qk_nope_head_dim"] = config["head_dim"] - rotated
    config["head_dim"] = rotated  # of which rotary settings speak
    if meta.get(f"{arch}.expert_gating_func", 0) != SIGMOID:
        config["model_type"] = "deepseek_v2"
        groups = config["n_group"] > 1
        config["topk_method"] = "group_limited_greedy" if groups else "greedy"


def latent_problems(config: DecoderConfig) -> list[str]:
    """Returns what llama.cpp would compute otherwise of a decoder with latent attention."""
    problems, experts = [], routed(config)
    spec = config.specs[0].mixer
    if (config.num_layers in (26, 27)) != (spec.query_rank is None):
        problems.append(
            f"q_lora_rank is {spec.query_rank}, of {config.num_layers} layers; llama.cpp takes "
            "models of 26 and 27 layers for those without one, and all others for those with"
        )
    if experts.groups > 1 and experts.best_of_group != 2:
        problems.append(
            f"n_group is {experts.groups}; llama.cpp ranks groups by their two best experts, "
            "this by the best"
        )
    return problems


def yarn_multiplier(config: DecoderConfig) -> float | None:
    """Returns mscale_all_dim of yarn, of a decoder's scale of scores; None without one."""
    if config.attention_scale is None or config.rope_scaling is None:
        return None
    grown = math.sqrt(config.attention_scale * math.sqrt(config.head_dim))
    return (grown - 1) / (0.1 * math.log(config.rope_scaling.factor))


def warn_of_latent(config: DecoderConfig) -> None:
    """Says where llama.cpp has another eps in norms of latent attention."""
    if config.rms_norm_eps != LATENT_EPS:
        logger.warning(
            "llama.cpp takes rms_norm_eps, which is %g, for the norms of small vectors of "
            "latent attention too; transformers takes %g",
            config.rms_norm_eps,
            LATENT_EPS,
        )


def olmo3(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of an OLMo 2 that has windows: only full layers are scaled."""
    theta = {"rope_theta": config["rope_theta"]}
    full = theta | config.get("rope_scaling", {})
    ropes = {"full_attention": full, "sliding_attention": theta}
    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    return plain | {"model_type": "olmo3", "rope_parameters": ropes}
