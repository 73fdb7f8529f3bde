"""The settings of a run, as plain values: what the command, its files and the code share.

RunConfig, all of them, is in `config.run`, which needs the command's parser.
"""

from qlora_jax.config.data import DataConfig as DataConfig
from qlora_jax.config.lora import LoRAConfig as LoRAConfig
from qlora_jax.config.objective import ObjectiveConfig as ObjectiveConfig
from qlora_jax.config.quant import QuantOptions as QuantOptions
from qlora_jax.config.train import TrainConfig as TrainConfig
