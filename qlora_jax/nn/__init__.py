"""Flax NNX modules: frozen and quantized linears, LoRA, norm, rotary, attention."""

from qlora_jax.nn.linear import Linear as Linear
from qlora_jax.nn.linear import QuantizedLinear as QuantizedLinear
from qlora_jax.nn.linear import quantize as quantize
from qlora_jax.nn.lora import LoRA as LoRA
from qlora_jax.nn.variables import FrozenParam as FrozenParam
