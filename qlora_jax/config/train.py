"""TrainConfig: how an adapter trains."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from qlora_jax.errors import ConfigError

Checkpoint = Literal["none", "attention", "layer", "host"]
"""What backward recomputes: 'none' elementwise work only; 'layer' each whole layer, from its
input; 'attention' all of it but attention's output; 'host' as 'layer', and the layers' inputs
wait in host memory."""

Optimizer = Literal["adamw", "adamw8bit"]
Schedule = Literal["constant", "linear", "cosine"]
ComputeDtype = Literal["bfloat16", "float32", "float16"]

_CHANGES_NOTHING = "no loss and no weight depends on it, so the run stays bit-equal"
ROUNDS = (
    "the arithmetic is the same in another compiled program, so losses from here on may "
    "differ in rounding and are not bit-equal"
)
MAY_CHANGE = {
    "max_steps": "the run ends at another step",
    "epochs": "the run ends at another step",
    "micro_batch": ROUNDS,
    "grad_accum": ROUNDS,
    "checkpoint": ROUNDS,
    "offload": ROUNDS,
    "resident_bytes": ROUNDS,
    "stream": ROUNDS,
    "eval_every": "eval losses are measured at other steps; no weight depends on them",
    "save_every": _CHANGES_NOTHING,
    "save_minutes": _CHANGES_NOTHING,
    "keep_checkpoints": _CHANGES_NOTHING,
    "check_finite": _CHANGES_NOTHING,
    "max_skipped": _CHANGES_NOTHING,
}
"""Settings that a run that goes on may have otherwise, and what that means for exactness.
Micro-batches must make the same rows a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """These settings say how an adapter trains. The defaults of learning rate, betas and
    clipping are those of the QLoRA paper for 7B and 13B."""

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
    """lora_b learns this many times as fast as lora_a (LoRA+, whose paper takes 16)."""

    schedule: Schedule = "constant"
    """After the warm-up: constant, or linear or cosine down to 0."""

    warmup_ratio: float = 0.03
    """Part of the steps over which the learning rate rises from 0."""

    max_grad_norm: float | None = 0.3
    """Gradients are scaled down to this global norm; None switches it off."""

    router_aux_loss: float = 0.0
    """The load-balance loss of a mixture's routers is added to the loss, multiplied by this
    number (transformers' router_aux_loss_coef, which config.json may suggest and is not read).
    Routers are frozen, so it reaches the adapters through what routers see."""

    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""

    beta1: float = 0.9
    """AdamW's decay of the first moment."""

    beta2: float = 0.999
    """AdamW's decay of the second moment."""

    seed: int = 0
    """The order of the rows, lora_a and dropout are drawn from this number."""

    compute_dtype: ComputeDtype = "bfloat16"
    """Activations and products have this dtype. float16, for GPUs without bfloat16, trains
    with dynamic loss scaling."""

    checkpoint: Checkpoint = "none"
    """What backward recomputes, for memory: none (elementwise work alone), attention (all of
    a layer but attention's output), layer (all, from its input), host (as layer, the inputs
    kept in host memory)."""

    offload: bool = False
    """Keep optimizer state in host memory between steps, and what micro-batches' gradients
    add up to between them."""

    resident_bytes: int = 0
    """With offload, so many bytes of that state stay on the device all the same;
    --train.offload auto finds the number."""

    stream: bool = False
    """Keep the layers' weights in host memory; each comes to the device when it is due."""

    eval_every: int | None = None
    """Steps between eval losses (one before and one after in any case)."""

    save_every: int | None = 250
    """Steps between checkpoints (one after the first step and one at the end in any case)."""

    save_minutes: float | None = None
    """Minutes between checkpoints, besides those of save_every: what a run may lose where
    steps take long."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept; the one with the least eval loss is kept besides."""

    check_finite: bool = False
    """Look at every array of the adapter after each step, and at the activations of a step
    that went wrong, so that a run that ends for a NaN or Inf names where it began. It costs
    memory for a second copy of the adapter."""

    max_skipped: int = 20
    """A float16 run ends after so many steps in a row that were skipped because their
    gradients overflowed."""

    def __post_init__(self):
        least = {
            "max_steps": 1,
            "micro_batch": 1,
            "grad_accum": 1,
            "eval_every": 1,
            "save_every": 1,
            "max_skipped": 1,
            "keep_checkpoints": 1,
            "seed": 0,
            "resident_bytes": 0,
        }
        problems = [
            f"--train.{name.replace('_', '-')} is {value}, expected at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
        if self.seed >= 2**63:
            problems.append(f"--train.seed is {self.seed}, expected less than 2**63")
        for name in ("learning_rate", "lora_plus_ratio", "epochs", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = name.replace("_", "-")
                problems.append(f"--train.{flag} is {value}, expected > 0")
        for name in ("warmup_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                flag = name.replace("_", "-")
                problems.append(
                    f"--train.{flag} is {getattr(self, name)}, expected 0 <= x < 1"
                )
        for name in ("weight_decay", "router_aux_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                problems.append(
                    f"--train.{flag} is {getattr(self, name)}, expected 0 or more"
                )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            problems.append(
                f"--train.max-grad-norm is {self.max_grad_norm}, expected > 0"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def steps(self, of_epochs: Callable[[float], int]) -> int:
        """Returns the optimizer steps of a run.

        Args:
          of_epochs: Passes over the data -> the steps of so many, `Batches.steps`.
        """
        return of_epochs(self.epochs) if self.max_steps is None else self.max_steps
