"""Models: one configurable decoder, and one small file for each Hugging Face family."""

from types import ModuleType
from typing import Any

import jax
from flax import nnx

from qlora_jax.models import (
    gemma,
    gemma2,
    gemma3_text,
    gemma4_text,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_5_text,
    qwen3_moe,
    reading,
    settings,
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
        qwen3_5_text,
        gemma,
        gemma2,
        gemma3_text,
        gemma4_text,
        phi3,
        smollm3,
        olmo2,
        granite,
        mixtral,
        qwen3_moe,
    )
}
"""Hugging Face model_type -> the module that reads it (read_config, NAMES, IGNORED)."""


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json of a known model_type, when each of its fields is what it can be.

    Returns:
      (config, []), or (None, problems).
    """
    family = FAMILIES[hf["model_type"]]
    hf = settings.present(hf, getattr(family, "DEFAULTS", {}))
    missing, wrong = settings.missing(hf), settings.misfitting(hf)
    if wrong:
        return None, missing + wrong
    if missing:
        return None, missing + reading.unknown(hf)
    return family.read_config(hf)


def abstract(config: DecoderConfig, dtype: str = "bfloat16") -> Decoder:
    """Returns a decoder whose parameters are shapes alone, dense and in this dtype."""
    return nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), dtype=dtype))


def hf_table(config: DecoderConfig) -> Table:
    """Returns what Hugging Face calls each parameter of a model of a family."""
    names = FAMILIES[config.model_type].NAMES
    return Table(names, config.num_layers, config.num_experts)
