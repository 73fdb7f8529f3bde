"""TrainState: what a run is at a step."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run between two steps. With the base, its data and its settings, all of it.

    The order of the data, the dropout keys and the learning rate follow from the seed and
    the step.

    Attributes:
      step: Optimizer steps taken.
      lora: The adapter, from `split`.
      opt_state: The optimizer's, where it rests between steps.
    """

    step: int
    lora: nnx.State
    opt_state: Any


def settled(tree: Any) -> Any:
    """Ties arrays to the devices they are on, as the step's results are.

    jit tells arrays that may still move from those that may not: without this the second
    step, and the second evaluation, would compile everything again.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)
