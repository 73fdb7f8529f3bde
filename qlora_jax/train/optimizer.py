"""The optimizer that a TrainConfig describes."""

import math
from typing import Any

import jax
import optax
from flax import nnx

from qlora_jax.config.train import TrainConfig
from qlora_jax.optim import dynamic_loss_scale, offload
from qlora_jax.optim.adamw import adamw, placed
from qlora_jax.optim.lora_plus import lora_plus


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Returns step -> learning rate."""
    warmup = math.ceil(config.warmup_ratio * steps)
    rest = max(1, steps - warmup)
    peak = config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    # From peak/warmup, not 0: the first step should do something.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def _decays(params: Any) -> Any:
    """Says of each variable whether it decays: matrices do, biases, norms, magnitudes not."""

    def matrix(variable: Any) -> bool:
        if not isinstance(variable, nnx.Variable):
            return True
        # `offload` leaves some variables out of an update; those have no array then.
        stack = variable.get_metadata().get("stack", 0)
        return getattr(variable.get_value(), "ndim", 0) - stack >= 2

    return jax.tree.map(matrix, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW as configured: clipped, offloaded, loss-scaled where asked for."""
    tx = adamw(
        config.optimizer,
        make_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_decays,
    )
    if config.lora_plus_ratio != 1:
        tx = optax.chain(tx, lora_plus(config.lora_plus_ratio))
    scaled = config.compute_dtype == "float16"
    if not scaled:
        # Before clipping, which looks across arrays: so the state comes slice by slice.
        tx = placed(tx, config.offload, config.resident_bytes)
    if config.max_grad_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)
    if scaled:
        tx = dynamic_loss_scale(tx)
        tx = offload(tx, resident_bytes=config.resident_bytes) if config.offload else tx
    return tx
