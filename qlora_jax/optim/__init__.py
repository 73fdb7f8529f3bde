"""Optax transforms: host-resident state, 8-bit AdamW, dynamic loss scaling."""

from qlora_jax.optim.eight_bit import adamw_8bit as adamw_8bit
from qlora_jax.optim.loss_scale import LossScaleState as LossScaleState
from qlora_jax.optim.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from qlora_jax.optim.offload import offload as offload
