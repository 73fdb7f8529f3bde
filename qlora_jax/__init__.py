"""QLoRA in JAX: 4-bit base weights, LoRA adapters trained through them.

The public names, each explained where it is defined. They load on first use, so that
`pallas_kernels` works on a host with jax and numpy alone.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.formats import QuantizedTensor as QuantizedTensor
    from qlora_jax.adapters.algebra import chain as chain
    from qlora_jax.adapters.algebra import compress as compress
    from qlora_jax.adapters.algebra import cosine_similarity as cosine_similarity
    from qlora_jax.adapters.algebra import difference as difference
    from qlora_jax.adapters.algebra import interpolate as interpolate
    from qlora_jax.adapters.algebra import scale as scale
    from qlora_jax.adapters.algebra import update_norms as update_norms
    from qlora_jax.adapters.attach import attach as attach
    from qlora_jax.adapters.attach import detach as detach
    from qlora_jax.adapters.attach import join as join
    from qlora_jax.adapters.attach import split as split
    from qlora_jax.adapters.bank import AdapterBank as AdapterBank
    from qlora_jax.adapters.combine import combine as combine
    from qlora_jax.adapters.compensate import compensate as compensate
    from qlora_jax.adapters.compensate import input_moments as input_moments
    from qlora_jax.adapters.merge import merge as merge
    from qlora_jax.adapters.merge import merge_corrected as merge_corrected
    from qlora_jax.adapters.merge import unmerge as unmerge
    from qlora_jax.adapters.merge_report import merge_report as merge_report
    from qlora_jax.adapters.value import Adapter as Adapter
    from qlora_jax.config.data import DataConfig as DataConfig
    from qlora_jax.config.lora import LoRAConfig as LoRAConfig
    from qlora_jax.config.quant import QuantConfig as QuantConfig
    from qlora_jax.config.train import TrainConfig as TrainConfig
    from qlora_jax.data.intake import load_dataset as load_dataset
    from qlora_jax.errors import QLoRAError as QLoRAError
    from qlora_jax.evaluate.perplexity import perplexity as perplexity
    from qlora_jax.exchange.ours import load_adapter as load_adapter
    from qlora_jax.exchange.ours import load_tokenizer as load_tokenizer
    from qlora_jax.exchange.ours import save_adapter as save_adapter
    from qlora_jax.exchange.peft import export_peft as export_peft
    from qlora_jax.exchange.peft import import_peft as import_peft
    from qlora_jax.exchange.read import read_adapter as read_adapter
    from qlora_jax.generate.sample import SampleConfig as SampleConfig
    from qlora_jax.generate.sample import generate as generate
    from qlora_jax.memory import Setup as Setup
    from qlora_jax.models.streaming import stream as stream
    from qlora_jax.nn.packing import dequantize as dequantize
    from qlora_jax.nn.packing import quantize_tensor as quantize_tensor
    from qlora_jax.nn.quantizing import quantize as quantize
    from qlora_jax.optim.eight_bit import adamw_8bit as adamw_8bit
    from qlora_jax.optim.loss_scale import dynamic_loss_scale as dynamic_loss_scale
    from qlora_jax.optim.offload import offload as offload
    from qlora_jax.plan import plan_memory as plan_memory
    from qlora_jax.sources.gguf.write import write_gguf as write_gguf
    from qlora_jax.sources.load import load as load
    from qlora_jax.sources.load import original_kernels as original_kernels
    from qlora_jax.sources.save import save_model as save_model
    from qlora_jax.sources.tokens import add_tokens as add_tokens
    from qlora_jax.train.loop import Trainer as Trainer
    from qlora_jax.train.step import make_train_step as make_train_step

_HOMES = {
    "qlora_jax.adapters.algebra": (
        "chain",
        "compress",
        "cosine_similarity",
        "difference",
        "interpolate",
        "scale",
        "update_norms",
    ),
    "qlora_jax.adapters.attach": ("attach", "detach", "join", "split"),
    "qlora_jax.adapters.bank": ("AdapterBank",),
    "qlora_jax.adapters.combine": ("combine",),
    "qlora_jax.adapters.compensate": ("compensate", "input_moments"),
    "qlora_jax.config.lora": ("LoRAConfig",),
    "qlora_jax.adapters.merge": ("merge", "merge_corrected", "unmerge"),
    "qlora_jax.adapters.merge_report": ("merge_report",),
    "qlora_jax.adapters.value": ("Adapter",),
    "qlora_jax.config.data": ("DataConfig",),
    "qlora_jax.data.intake": ("load_dataset",),
    "qlora_jax.errors": ("QLoRAError",),
    "qlora_jax.evaluate.perplexity": ("perplexity",),
    "qlora_jax.generate.sample": ("SampleConfig", "generate"),
    "qlora_jax.exchange.ours": ("load_adapter", "load_tokenizer", "save_adapter"),
    "qlora_jax.sources.load": ("load", "original_kernels"),
    "qlora_jax.sources.save": ("save_model",),
    "qlora_jax.sources.gguf.write": ("write_gguf",),
    "qlora_jax.exchange.read": ("read_adapter",),
    "qlora_jax.sources.tokens": ("add_tokens",),
    "qlora_jax.exchange.peft": ("export_peft", "import_peft"),
    "qlora_jax.memory": ("Setup",),
    "qlora_jax.models.streaming": ("stream",),
    "qlora_jax.plan": ("plan_memory",),
    "qlora_jax.nn.quantizing": ("quantize",),
    "qlora_jax.optim.eight_bit": ("adamw_8bit",),
    "qlora_jax.optim.loss_scale": ("dynamic_loss_scale",),
    "qlora_jax.optim.offload": ("offload",),
    "pallas_kernels.formats": ("QuantizedTensor",),
    "qlora_jax.config.quant": ("QuantConfig",),
    "qlora_jax.nn.packing": ("dequantize", "quantize_tensor"),
    "qlora_jax.config.train": ("TrainConfig",),
    "qlora_jax.train.loop": ("Trainer",),
    "qlora_jax.train.step": ("make_train_step",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    # A subpackage of the same name (generate, quantize) must not shadow it later.
    globals()[name] = value
    return value


class _Front(types.ModuleType):
    """Keeps a subpackage from hiding the function of its name (generate)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front


def __dir__() -> list[str]:
    return sorted([*_HOME_OF, "__version__"])
