"""TrainConfig and the optimizer it describes."""

import dataclasses
import math
from typing import Any, Literal

import jax
import optax
from flax import nnx

from qlora_jax.errors import ConfigError
from qlora_jax.models.decoder import Checkpoint
from qlora_jax.optim import dynamic_loss_scale, offload
from qlora_jax.optim.adamw import Optimizer, adamw, placed
from qlora_jax.optim.lora_plus import lora_plus

Schedule = Literal["constant", "linear", "cosine"]
ComputeDtype = Literal["bfloat16", "float32", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Learning rate, betas, clipping follow the QLoRA paper (7B, 13B)."""

    max_steps: int | None = None
    """Optimizer steps; None for as many as `epochs` takes."""

    epochs: float = 1.0
    """Passes over the data, where max_steps is not given."""

    micro_batch: int = 4
    """Rows in one forward and backward."""

    grad_accum: int = 4
    """Micro-batches a step, accumulated inside the compiled step."""

    optimizer: Optimizer = "adamw"
    """adamw, or adamw8bit with its moments in 8 bits (2 bytes a parameter, not 8)."""

    learning_rate: float = 2e-4
    """Peak of the schedule."""

    lora_plus_ratio: float = 1.0
    """Of lora_b's learning rate to lora_a's (LoRA+; 16 in its paper)."""

    schedule: Schedule = "constant"
    """After the warm-up: constant, or linear or cosine down to 0."""

    warmup_ratio: float = 0.03
    """Part of the steps over which the learning rate rises from 0."""

    max_grad_norm: float | None = 0.3
    """Gradients are scaled down to this global norm; None switches it off."""

    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""

    beta1: float = 0.9
    """AdamW's decay of the first moment."""

    beta2: float = 0.999
    """AdamW's decay of the second moment."""

    seed: int = 0
    """Of the data order, lora_a and dropout."""

    compute_dtype: ComputeDtype = "bfloat16"
    """Of activations and matmuls. float16 trains with dynamic loss scaling."""

    checkpoint: Checkpoint = "none"
    """What backward recomputes, for memory: none (elementwise work alone), attention (all of
    a layer but attention's output), layer (all, from its input), host (as layer, the inputs
    kept in host memory)."""

    offload: bool = False
    """Keep optimizer state in host memory between steps, and what micro-batches' gradients
    add up to between them."""

    resident_bytes: int = 0
    """Of that state what stays on the device all the same; --train.offload auto finds it."""

    stream: bool = False
    """Keep the layers' weights in host memory; each comes to the device when it is due."""

    eval_every: int | None = None
    """Steps between eval losses (one before and one after in any case)."""

    save_every: int | None = 250
    """Steps between checkpoints (one at the end in any case)."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self):
        least = {
            "max_steps": 1,
            "micro_batch": 1,
            "grad_accum": 1,
            "eval_every": 1,
            "save_every": 1,
            "keep_checkpoints": 1,
            "seed": 0,
            "resident_bytes": 0,
        }
        problems = [
            f"--train.{name.replace('_', '-')} is {value}, expected at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
        for name in ("learning_rate", "lora_plus_ratio", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                problems.append(
                    f"--train.{flag} is {getattr(self, name)}, expected > 0"
                )
        for name in ("warmup_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                flag = name.replace("_", "-")
                problems.append(
                    f"--train.{flag} is {getattr(self, name)}, expected 0 <= x < 1"
                )
        if not 0 <= self.weight_decay < math.inf:
            problems.append(
                f"--train.weight-decay is {self.weight_decay}, expected 0 or more"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            problems.append(
                f"--train.max-grad-norm is {self.max_grad_norm}, expected > 0"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def steps(self, rows: int) -> int:
        """Returns the optimizer steps for a dataset of `rows`."""
        if self.max_steps is not None:
            return self.max_steps
        return max(
            1, math.ceil(rows * self.epochs / (self.micro_batch * self.grad_accum))
        )


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
