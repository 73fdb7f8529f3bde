"""The settings of a run, as plain values: what the command, its files and the code share."""

from qlora_jax.config.data import DataConfig as DataConfig
from qlora_jax.config.lora import LoRAConfig as LoRAConfig
from qlora_jax.config.quant import QuantOptions as QuantOptions
from qlora_jax.config.run import RunConfig as RunConfig
from qlora_jax.config.train import TrainConfig as TrainConfig
