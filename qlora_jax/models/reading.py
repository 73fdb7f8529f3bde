"""What config.json files of all families have in common, read into a DecoderConfig."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import AttentionSpec
from qlora_jax.nn.rope import Rope, RopeScaling

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
SLIDING, FULL = "sliding_attention", "full_attention"
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}

Read = tuple[DecoderConfig | None, list[str]]
"""A decoder's config and no problems, or None and every problem found."""


def read(
    hf: dict[str, Any],
    problems: Iterable[str] = (),
    *,
    rope: dict[str, Any] | None = None,
    partial_rotary: bool = False,
    types: Iterable[str] | None = None,
    sliding_rope: Rope | Literal["global", "none"] = "global",
    full_rope: Literal["global", "none"] = "global",
    mixers: Sequence[Any] | None = None,
    feed_forwards: Sequence[Any] | None = None,
    **fields: Any,
) -> Read:
    """Reads what families share.

    Args:
      hf: The object of config.json.
      problems: Problems that were found already.
      rope: Rotary settings, where they are not at their usual place.
      partial_rotary: Whether a share of a head may be rotated where positions are not
        scaled, as transformers has it in some families alone.
      types: What layer_types is where config.json has none; None for a family whose
        layers are all alike.
      sliding_rope: The rotary positions of sliding layers, an AttentionSpec's.
      full_rope: Those of the others, where `types` says which these are.
      mixers: A spec a layer, where layers differ in it and not as `types` has them.
      feed_forwards: A spec a layer, where layers differ in it.
      **fields: The values that this family gives to fields of DecoderConfig.
    """
    found = unknown(hf, rope)
    found += problems
    if found:
        return None, found
    scaling, theta, partial, _ = read_rope(hf, rope)
    if scaling is None and not partial_rotary:
        partial = 1.0
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    features = head_dim(hf)
    rotated = int(features * partial)
    found += _heads_problems(heads, kv_heads, features, rotated, scaling)
    if scaling is not None and scaling.kind == "longrope":
        sizes = {len(scaling.short_factor), len(scaling.long_factor)}
        if sizes != {rotated // 2}:
            found.append(
                f"rope_scaling has short_factor and long_factor of {sorted(sizes)} values, "
                f"expected {rotated // 2}"
            )
    if types is not None:
        mixers, more = _mixers(hf, list(types), sliding_rope, full_rope)
        found += more
    experts = fields.get("num_experts", 0)
    least = min(1, experts)
    taken = fields.get("experts_per_token", least)
    if not least <= taken <= experts:
        found.append(f"num_experts_per_tok is {taken}, of {experts} experts")
    if found:
        return None, found
    bias = bool(hf.get("attention_bias", False))
    values = {
        "model_type": hf.get("model_type", "llama"),
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": features,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": None if partial == 1 else rotated,
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "attention_bias": bias,
        "output_bias": bias,
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "activation": ACTIVATIONS[_activation(hf)],
    }
    config = DecoderConfig(**values | fields)
    return with_layers(config, mixers, feed_forwards), []


def head_dim(hf: dict[str, Any]) -> int:
    """Returns the features of a head."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def unknown(hf: dict[str, Any], rope: dict[str, Any] | None = None) -> list[str]:
    """Returns what of a config.json no decoder here has, apart from its sizes.

    Args:
      hf: The object of config.json.
      rope: Its rotary settings, where they are not at their usual place.
    """
    found = []
    if (act := _activation(hf)) not in ACTIVATIONS:
        found.append(f"hidden_act is {act!r}; known: {', '.join(ACTIVATIONS)}")
    if hf.get("mlp_bias"):
        found.append("mlp_bias is true; no bias in the feed-forward is supported")
    *_, problem = read_rope(hf, rope)
    return found + ([problem] if problem else [])


def _activation(hf: dict[str, Any]) -> str:
    return hf.get("hidden_act") or hf.get("hidden_activation") or "silu"


def _heads_problems(
    heads: int, kv_heads: int, head_dim: int, rotated: int, scaling: RopeScaling | None
) -> list[str]:
    """Returns what does not go together in the sizes of heads."""
    problems = []
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads, "
            f"which is {kv_heads}"
        )
    least = 4 if scaling is not None and scaling.kind in ("dynamic", "yarn") else 2
    if rotated % 2 or rotated < least:
        problems.append(
            f"a head has {head_dim} features, of which {rotated} are rotated; expected an "
            f"even number, at least {least}"
        )
    return problems


def with_layers(
    config: DecoderConfig,
    mixers: Sequence[Any] | None,
    feed_forwards: Sequence[Any] | None = None,
) -> DecoderConfig:
    """Returns a config whose layers have these mixers and feed-forwards.

    Args:
      config: What layers share.
      mixers: A spec a layer; None leaves them as they are.
      feed_forwards: A spec a layer; None leaves them as they are.
    """
    plain, specs = dataclasses.replace(config, layers=()), list(config.specs)
    for field, given in (("mixer", mixers), ("feed_forward", feed_forwards)):
        if given is not None:
            pairs = zip(specs, given, strict=True)
            specs = [dataclasses.replace(spec, **{field: one}) for spec, one in pairs]
    if tuple(specs) == plain.specs:
        return plain
    return dataclasses.replace(config, layers=tuple(specs))


def read_rope(
    hf: dict[str, Any], settings: dict[str, Any] | None = None
) -> tuple[RopeScaling | None, float, float, str | None]:
    """Reads rotary settings, in both of Hugging Face's spellings.

    Args:
      hf: The object of config.json.
      settings: Its rotary ones, where they are not at their usual place.

    Returns:
      (scaling, theta, share of a head that is rotated, problem).
    """
    rope: dict[str, Any] = (
        settings or hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    )
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None, theta, partial, None
    if kind not in _NEEDS:
        known = ", ".join(("default", *_NEEDS))
        problem = f"rope_scaling has type {kind!r}; known: {known}"
        return None, theta, partial, problem
    longest = hf.get("max_position_embeddings", 2048)
    pretrained = hf.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", longest
    )
    given = {name for name, value in rope.items() if value is not None}
    if kind == "yarn":
        given.add("factor")  # it follows from both lengths
    if missing := [name for name in _NEEDS[kind] if name not in given]:
        problem = f"rope_scaling of type {kind!r} lacks {', '.join(missing)}"
        return None, theta, partial, problem
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and low is not None and high is not None and not low < high:
        problem = (
            f"rope_scaling has low_freq_factor {low} and high_freq_factor {high}, expected "
            "the first to be less"
        )
        return None, theta, partial, problem
    factor = rope.get("factor") or longest / pretrained
    values: dict[str, Any] = {"factor": factor}
    if kind == "dynamic":
        values["original_max_position"] = longest
    elif kind == "llama3":
        values["low_freq_factor"] = rope["low_freq_factor"]
        values["high_freq_factor"] = rope["high_freq_factor"]
        values["original_max_position"] = pretrained
    elif kind == "yarn":
        values["original_max_position"] = pretrained
        values["attention_factor"] = _yarn_attention(rope, factor)
        values["beta_fast"] = rope.get("beta_fast") or 32
        values["beta_slow"] = rope.get("beta_slow") or 1
        values["truncate"] = bool(rope.get("truncate", True))
    elif kind == "longrope":
        attention = rope.get("attention_factor")
        if attention is None:
            grown = 1 + math.log(factor) / math.log(pretrained) if factor > 1 else 1
            attention = math.sqrt(grown)
        values["original_max_position"] = pretrained
        values["attention_factor"] = attention
        values["short_factor"] = tuple(rope["short_factor"])
        values["long_factor"] = tuple(rope["long_factor"])
    elif kind == "proportional":
        # All of a head is rotated, most of it by nothing.
        values, partial = {"factor": rope.get("factor") or 1.0, "share": partial}, 1.0
    return RopeScaling(kind=kind, **values), theta, partial, None


def yarn_scale(factor: float, m: float) -> float:
    """Returns what yarn multiplies cosines and sines by, or DeepSeek scores, for an mscale."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _yarn_attention(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    m, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if m and all_dim:
        return yarn_scale(factor, m) / yarn_scale(factor, all_dim)
    return yarn_scale(factor, 1)


def _mixers(
    hf: dict[str, Any],
    default: list[str],
    sliding_rope: Rope | Literal["global", "none"],
    full_rope: Literal["global", "none"],
) -> tuple[list[AttentionSpec], list[str]]:
    """Reads which layers attend in a sliding window."""
    types = hf.get("layer_types") or default
    problems = kind_problems(types, hf["num_hidden_layers"], (FULL, SLIDING))
    sliding = AttentionSpec(window=hf.get("sliding_window"), rope=sliding_rope)
    full = AttentionSpec(rope=full_rope)
    return [sliding if t == SLIDING else full for t in types], problems


def kind_problems(
    kinds: Sequence[str],
    layers: int,
    known: Sequence[str],
    older: Sequence[str] = (),
    name: str = "layer_types",
) -> list[str]:
    """Returns what is wrong with a list of a kind for each layer.

    Args:
      kinds: The list.
      layers: The number of layers.
      known: The kinds that there are.
      older: What transformers called some of them once.
      name: The field of config.json.
    """
    problems = []
    if len(kinds) != layers:
        problems.append(f"{name} has {len(kinds)} entries for {layers} layers")
    if unknown := sorted({*kinds} - {*known, *older}):
        problems.append(f"{name} has {', '.join(unknown)}; known: {', '.join(known)}")
    return problems


def full_each(hf: dict[str, Any], every: Any) -> tuple[list[str], list[str]]:
    """Returns layer types, of which every n-th is full attention, and problems.

    Args:
      hf: The object of config.json. Where it has layer_types, these are what counts, and
        nothing is returned.
      every: Its sliding_window_pattern, or what stands for it: n.
    """
    if hf.get("layer_types"):
        return [], []
    if type(every) is not int or every < 1:
        problem = (
            f"sliding_window_pattern is {every!r}, expected a whole number above 0"
        )
        return [], [problem]
    layers = range(hf.get("num_hidden_layers") or 0)
    return [SLIDING if (i + 1) % every else FULL for i in layers], []


def qwen_types(hf: dict[str, Any]) -> list[str] | None:
    """Returns Qwen's layer types: windows from max_window_layers on, if it uses any."""
    if not hf.get("use_sliding_window"):
        return None
    layers, first = hf.get("num_hidden_layers") or 0, hf.get("max_window_layers", 28)
    return [SLIDING if i >= first else FULL for i in range(layers)]
