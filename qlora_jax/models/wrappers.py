"""Text models inside multimodal ones: the config.json that the text model alone would have.

A folder of Gemma 3 4B has `model_type` "gemma3", the language model's settings under
`text_config`, and its tensors under `language_model.`. For text, the whole computes what
its language model does, whose arithmetic is that of a family. So `unwrap` returns the
config of that family, complete: what the wrapper's classes fill in is written out.

Only wrappers whose logits on text were compared with transformers 5.24's are here.
Source of all defaults: transformers 5.24, models/*/configuration_*.py.
"""

import re
from typing import Any, Literal, NamedTuple

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


class Text(NamedTuple):
    """A kind of text model in a wrapper.

    Attributes:
      family: The model_type that has its arithmetic.
      architecture: The class that opens it alone.
      sizes: Defaults of SIZES.
      defaults: Others that the family's own config class does not have alike.
    """

    family: str
    architecture: str
    sizes: tuple[int, int, int, int, int]
    defaults: dict[str, Any] = {}


_QWEN2_VL = Text(
    "qwen2",
    "Qwen2ForCausalLM",
    (152064, 8192, 29568, 80, 64),
    {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
        "rope_theta": 1e6,
    },
)
TEXTS = {
    "gemma3_text": Text(
        "gemma3_text", "Gemma3ForCausalLM", (262208, 2304, 9216, 26, 8)
    ),
    "gemma4_text": Text(
        "gemma4_text", "Gemma4ForCausalLM", (262144, 2304, 9216, 30, 8)
    ),
    "llama": Text("llama", "LlamaForCausalLM", (32000, 4096, 11008, 32, 32)),
    "ministral3": Text(
        "ministral3", "Ministral3ForCausalLM", (131072, 4096, 14336, 34, 32)
    ),
    "mistral": Text("mistral", "MistralForCausalLM", (32000, 4096, 14336, 32, 32)),
    "qwen2": Text("qwen2", "Qwen2ForCausalLM", (151936, 4096, 22016, 32, 32)),
    "qwen3": Text("qwen3", "Qwen3ForCausalLM", (151936, 4096, 22016, 32, 32)),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_5_text": Text(
        "qwen3_5_text", "Qwen3_5ForCausalLM", (248320, 4096, 12288, 32, 16)
    ),
    "qwen3_5_moe_text": Text(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", (248320, 2048, 512, 40, 16)
    ),
    "qwen3_vl_text": Text(
        "qwen3",
        "Qwen3ForCausalLM",
        (151936, 4096, 22016, 32, 32),
        {"rope_theta": 5e5, "max_position_embeddings": 128000},
    ),
}
"""model_type of a text_config -> what it is."""


class Wrapper(NamedTuple):
    """A multimodal model.

    Attributes:
      default: model_type of a text_config that names none.
      tied: What tie_word_embeddings is: 'outer', the wrapper's own; 'either', that or
        the text_config's.
      tied_default: The wrapper's own where it is missing.
    """

    default: str
    tied: Literal["outer", "either"] = "either"
    tied_default: bool = False


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", "outer", True),
    "gemma4": Wrapper("gemma4_text", "outer", True),
    "internvl": Wrapper("qwen2", "outer", True),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama", "outer"),
    "llava_onevision": Wrapper("qwen2"),
    "mistral3": Wrapper("mistral", "outer", True),
    "qwen2_vl": Wrapper("qwen2_vl_text"),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text"),
    "qwen3_5": Wrapper("qwen3_5_text", "outer"),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", "outer"),
    "qwen3_vl": Wrapper("qwen3_vl_text", "outer"),
}
"""model_type of a wrapper -> how its config.json is read."""

_OWN = re.compile(r"^(?:model\.)?language_model\.")
_OUTER = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "torch_dtype", "quantization_config"),
)


def without_wrapper(name: str) -> str:
    """Returns a tensor's or module's name inside its language model.

    Every form that transformers opens is known: `language_model.model.layers...` (until
    4.51), `model.language_model.layers...` (since) and `language_model.lm_head`.
    """
    return _OWN.sub("", name)


def unwrap(hf: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the config.json of a wrapper's text model alone, and problems.

    Args:
      hf: The object of a config.json whose model_type is one of WRAPPERS.
    """
    kind = hf["model_type"]
    wrapper, inner = WRAPPERS[kind], hf.get("text_config")
    if inner is None and wrapper.default.startswith("qwen2"):
        # Early Qwen2-VL folders have the text model's settings at the top.
        inner = {k: v for k, v in hf.items() if not k.endswith(("_config", "_type"))}
    inner = {} if inner is None else inner
    if not isinstance(inner, dict):
        return hf, [f"text_config is {inner!r}, expected an object"]
    named = inner.get("model_type") or wrapper.default
    named = wrapper.default if named == kind else named
    if not isinstance(named, str) or named not in TEXTS:
        known = ", ".join(TEXTS)
        problem = f"text_config of this {kind} has model_type {named!r}; known: {known}"
        return hf, [problem]
    text = TEXTS[named]
    made: dict[str, Any] = dict(zip(SIZES, text.sizes, strict=True))
    made |= text.defaults | inner
    made |= {k: hf[k] for k in _OUTER if hf.get(k) is not None}
    made |= {"model_type": text.family, "architectures": [text.architecture]}
    tied = hf.get("tie_word_embeddings", wrapper.tied_default)
    if wrapper.tied == "either" and not tied:
        tied = inner.get("tie_word_embeddings", text.family == "gemma3_text")
    made["tie_word_embeddings"] = bool(tied)
    if text.family == "gemma3_text":
        made["final_logit_softcapping"] = None  # which the wrapper's head does not heed
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(made.get(key), dict):
            made[key] = _plain_rope(made[key])
    if isinstance(stored := made.get("quantization_config"), dict):
        made["quantization_config"] = _of_text(stored)
    return made, []


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Returns rotary settings without those for images.

    Text has the same position on all three axes of Qwen's mrope, which then is RoPE.
    """
    plain = {k: v for k, v in rope.items() if not k.startswith("mrope")}
    for key in ("type", "rope_type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain


def _of_text(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns a quantization_config that names modules of the text model alone."""
    skip = stored.get("llm_int8_skip_modules")
    if not skip:
        return stored
    other = re.compile(
        r"(^|\.)(vis|audio_tower|embed_(vision|audio)|multi_modal_projector|image_newline)"
    )
    kept = [without_wrapper(name) for name in skip if not other.search(name)]
    return stored | {"llm_int8_skip_modules": kept}
