"""Models: one configurable decoder, and one small file for each Hugging Face family."""

from types import ModuleType

from qlora_jax.models import llama, mistral, qwen2
from qlora_jax.models.decoder import Decoder as Decoder
from qlora_jax.models.decoder import DecoderConfig as DecoderConfig

FAMILIES: dict[str, ModuleType] = {
    family.MODEL_TYPE: family for family in (llama, mistral, qwen2)
}
"""Hugging Face model_type -> the module that reads it (read_config, NAMES, IGNORED)."""
