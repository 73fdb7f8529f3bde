"""What llama.cpp takes for granted of each architecture, and what it calls their settings.

Source: conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from typing import Any, NamedTuple


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


_FACTORED = ("linear", "yarn", "llama3")
ARCHITECTURES = {
    "llama": Architecture("llama", scalings=_FACTORED, biases=True),
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
    "command-r": Architecture("cohere", layer_norm=True, tied=True),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture(
        "exaone4", window=4096, pattern=4, windowed=64, scalings=_FACTORED
    ),
    "glm4": Architecture("glm4", partial=True, biases=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "olmo2": Architecture("olmo2", window=0, pattern=4, tied=False),
    "seed_oss": Architecture("seed_oss", biases=True),
}
WRITTEN_AS = {a.model_type: name for name, a in ARCHITECTURES.items()}
WRITTEN_AS |= {"mistral": "llama", "olmo3": "olmo2"}
"""model_type -> the architecture that a model of it is written as."""


class Key(NamedTuple):
    """A setting's names in GGUF, in config.json and in DecoderConfig."""

    gguf: str
    hf: str
    field: str
    kind: type = int
    required: bool = True


KEYS = (
    Key("embedding_length", "hidden_size", "hidden_size"),
    Key("block_count", "num_hidden_layers", "num_layers"),
    Key("feed_forward_length", "intermediate_size", "intermediate_size"),
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


def keys(arch: str) -> tuple[Key, ...]:
    """Returns the settings that files of an architecture hold."""
    return LAYER_NORM_KEYS if ARCHITECTURES[arch].layer_norm else KEYS
