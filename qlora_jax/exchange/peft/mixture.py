"""Writing adapters of mixtures as PEFT 0.21 takes them.

transformers 5 holds the linears of a layer's experts as parameters, and PEFT has adapters of
such (parameters.py). Where transformers joins the experts of a file, PEFT turns adapters of
single experts into its own, doubling rank and alpha of gate and up: rsLoRA comes out too
strong, patterns of experts are ignored, dropout is refused. So scales go into lora_b, smaller
ranks are padded with zeros, and dropout, which only training has, is left out. It takes every
target of an expert's name for the experts', so a shared expert's linears, and those of layers
without experts, are named as the weights that they are. Where the files themselves hold experts
together, PEFT turns nothing, and its own form is written.

Source: PEFT 0.21.2, utils/transformers_weight_conversion.py.
"""

import dataclasses

import numpy as np

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError, gathered
from qlora_jax.exchange.peft.parameters import whole
from qlora_jax.models import FAMILIES, DecoderConfig, fused_in, whole_parameters
from qlora_jax.names import Numbered
from qlora_jax.nn.lora import adapter_scale

_NOT_TURNED = ("qwen2_moe", "lfm2_moe")
"""Families whose settings PEFT does not turn, though it turns their tensors."""


@dataclasses.dataclass
class Mixture:
    """An adapter as PEFT takes it.

    Attributes:
      config: Its settings.
      flat: The arrays of modules, by our names.
      tensors: Those of whole parameters, by PEFT's.
      parameters: What target_parameters is.
      ranks, alphas: The ranks and alphas of whole parameters that differ from `config`'s.
      whole: Modules that whole parameters hold, by Hugging Face's names.
      as_weights: Modules that target_parameters names, by Hugging Face's names.
    """

    config: LoRAConfig
    flat: dict[str, np.ndarray]
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    parameters: list[str] = dataclasses.field(default_factory=list)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    whole: set[str] = dataclasses.field(default_factory=set)
    as_weights: set[str] = dataclasses.field(default_factory=set)


def of_mixture(
    config: LoRAConfig,
    flat: dict[str, np.ndarray],
    names: dict[str, str],
    model: DecoderConfig,
) -> Mixture:
    """Returns an adapter as PEFT takes it; of a model without experts as it is.

    Args:
      config, flat: The adapter, its arrays by our names.
      names: What Hugging Face calls our modules.
      model: The model's shape.

    Raises:
      AdapterMismatchError: DoRA; or gate_proj or up_proj of experts alone, where PEFT turns
        adapters of single experts.
    """
    family = FAMILIES[model.model_type]
    parameters = whole_parameters(family)
    fused = bool(fused_in(family)) or model.model_type in _NOT_TURNED
    experts = {ours for ours in names if ".experts." in ours}
    taken = {part.split(".")[-2] for one in parameters for part in one.parts}
    adapted = {
        name.rpartition(".")[0]
        for name in flat
        if name.endswith((".lora_a", ".lora_b"))
    }
    as_weights = {
        names[ours]
        for ours in adapted - experts
        if not fused and names[ours].rpartition(".")[2] in taken
    }
    if not parameters or not (adapted & experts or as_weights):
        return Mixture(config, flat)
    if problems := _problems(config, flat, fused=fused):
        raise AdapterMismatchError(
            gathered("this adapter of experts has no form in PEFT", problems)
        )
    config, flat = _evened(config, flat)
    made = Mixture(config, flat, as_weights=as_weights)
    made.parameters = sorted(f"{module}.weight" for module in as_weights)
    if fused:
        own = adapted & experts
        factors = {
            names[ours]: (flat[f"{ours}.lora_a"], flat[f"{ours}.lora_b"])
            for ours in own
        }
        together = whole(factors, parameters, model.num_experts)
        made.flat = {
            name: array
            for name, array in flat.items()
            if name.rpartition(".")[0] not in own
        }
        made.tensors, made.whole = together.tensors, {names[ours] for ours in experts}
        made.parameters += together.parameters
        several = [(name.partition("{}.")[2], n) for name, n in together.parts.items()]
        made.ranks = {name: n * config.rank for name, n in several if n > 1}
        made.alphas = {name: n * config.alpha for name, n in several if n > 1}
    return made


def _problems(
    config: LoRAConfig, flat: dict[str, np.ndarray], *, fused: bool
) -> list[str]:
    """Returns why PEFT cannot hold an adapter of experts."""
    problems = []
    if config.dora:
        problems.append("DoRA: PEFT has none for experts")
    parts = {name.split(".")[-2] for name in flat if ".experts." in name}
    if not fused and len(parts & {"gate_proj", "up_proj"}) == 1:
        problems.append(
            f"{', '.join(sorted(parts))} of experts: PEFT needs gate_proj and up_proj together"
        )
    return problems


def _evened(
    config: LoRAConfig, flat: dict[str, np.ndarray]
) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """Returns an adapter with one rank and alpha for all, which says the same."""
    if not (config.rslora or config.rank_pattern or config.alpha_pattern):
        return dataclasses.replace(config, dropout=0.0), flat
    rank = max([config.rank, *config.rank_pattern.values()])
    made = {}
    for name, array in flat.items():
        path, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b"):
            own, alpha = config.shape_of(Numbered.parse(path).path)
            spare = (
                [(0, 0), (0, rank - own)]
                if part == "lora_a"
                else [(0, rank - own), (0, 0)]
            )
            array = np.pad(array, spare)
            if part == "lora_b":
                scale = adapter_scale(own, alpha, config.rslora)
                array = array * np.float32(scale * rank / config.alpha)
        made[name] = array
    plain = {"rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "dropout": 0.0}
    return dataclasses.replace(config, rank=rank, **plain), made
