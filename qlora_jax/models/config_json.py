"""A config.json for a decoder that was read from no folder, such as one made at random."""

from typing import Any

from qlora_jax.errors import CheckpointError
from qlora_jax.models import FAMILIES, llama
from qlora_jax.models.config import DecoderConfig


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns a config.json for a decoder that came from no folder.

    Raises:
      CheckpointError: it is no Llama, Mistral or Qwen2.
    """
    rope: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    kind, architecture = llama.MODEL_TYPE, "LlamaForCausalLM"
    if config.sliding_window is not None:
        kind, architecture = "mistral", "MistralForCausalLM"
    elif config.attention_bias and not config.output_bias:
        kind, architecture = "qwen2", "Qwen2ForCausalLM"
    written = {
        "architectures": [architecture],
        "model_type": kind,
        "sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if FAMILIES[kind].read_config(written)[0] != config:
        raise CheckpointError(
            "the model's shape is of no family whose config.json can be written from "
            "nothing (llama, mistral, qwen2); give the folder it came from as source="
        )
    return written
