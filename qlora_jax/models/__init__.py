"""Models: one configurable decoder, and one small file for each Hugging Face family."""

from types import ModuleType

import jax
from flax import nnx

from qlora_jax.models import (
    gemma,
    gemma2,
    gemma3_text,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from qlora_jax.models.config import DecoderConfig as DecoderConfig
from qlora_jax.models.decoder import Decoder as Decoder
from qlora_jax.names import Table

FAMILIES: dict[str, ModuleType] = {
    family.MODEL_TYPE: family
    for family in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma,
        gemma2,
        gemma3_text,
        phi3,
        smollm3,
        olmo2,
        granite,
        mixtral,
        qwen3_moe,
    )
}
"""Hugging Face model_type -> the module that reads it (read_config, NAMES, IGNORED)."""


def abstract(config: DecoderConfig, dtype: str = "bfloat16") -> Decoder:
    """Returns a decoder whose parameters are shapes alone, dense and in this dtype."""
    return nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), dtype=dtype))


def hf_table(config: DecoderConfig) -> Table:
    """Returns what Hugging Face calls each parameter of a model of a family."""
    names = FAMILIES[config.model_type].NAMES
    return Table(names, config.num_layers, config.num_experts)
