"""Models: one configurable decoder, and one small file for each Hugging Face family."""

from types import ModuleType
from typing import Any

import jax
from flax import nnx

from qlora_jax.models import (
    arcee,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma,
    gemma2,
    gemma3_text,
    gemma4_text,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    kimi_k2,
    lfm2,
    lfm2_moe,
    llama,
    minimax_m2,
    ministral3,
    mistral,
    mixtral,
    nanochat,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    reading,
    seed_oss,
    settings,
    smollm3,
)
from qlora_jax.models.config import DecoderConfig as DecoderConfig
from qlora_jax.models.decoder import Decoder as Decoder
from qlora_jax.models.fused import Fused
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
        olmo3,
        granite,
        granitemoehybrid,
        seed_oss,
        ministral3,
        hunyuan_v1_dense,
        exaone4,
        glm,
        glm4,
        ernie4_5,
        cohere,
        cohere2,
        helium,
        nanochat,
        arcee,
        lfm2,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        qwen3_next,
        qwen3_5_moe_text,
        olmoe,
        glm4_moe,
        glm4_moe_lite,
        deepseek_v2,
        deepseek_v3,
        kimi_k2,
        lfm2_moe,
        minimax_m2,
        ernie4_5_moe,
        gpt_oss,
    )
}
"""Hugging Face model_type -> the module that reads it: `read_config`, NAMES, IGNORED, and where
its files hold experts together FUSED, or where transformers does, and under other names,
PARAMETERS; and DENSE_NAMES where a model without experts calls the same tensors otherwise."""


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json of a known model_type, when each of its fields is what it can be.

    Returns:
      (config, []), or (None, problems).
    """
    family = FAMILIES[hf["model_type"]]
    own = getattr(family, "DEFAULTS", {})
    hf = settings.present(hf, own)
    missing, wrong = settings.missing(own | hf), settings.misfitting(hf)
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
    family = FAMILIES[config.model_type]
    names = family.NAMES
    if not config.num_experts:
        names = getattr(family, "DENSE_NAMES", names)
    return Table(names, config.num_layers, config.num_experts)


def fused_in(family: ModuleType) -> tuple[Fused, ...]:
    """Returns which tensors of a family's files hold all experts of a layer."""
    return getattr(family, "FUSED", ())


def whole_parameters(family: ModuleType) -> tuple[Fused, ...]:
    """Returns what linears of experts transformers holds as parameters of a layer."""
    weights = [one for one in fused_in(family) if one.parts[0].endswith(".weight")]
    return getattr(family, "PARAMETERS", tuple(weights))
