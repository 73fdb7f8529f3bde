"""The gradient of an objective over the micro-batches of a step."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters import join
from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError
from qlora_jax.names import in_words
from qlora_jax.nn.variables import rests_on_host
from qlora_jax.objectives import Objective
from qlora_jax.objectives.base import Batch
from qlora_jax.train.router_loss import balanced


def make_gradient(
    graphdef: nnx.GraphDef,
    objective: Objective,
    checkpoint: Checkpoint,
    sums: Any,
    router_aux_loss: float = 0.0,
) -> Callable[..., tuple[Array, dict[str, Any], nnx.State]]:
    """Makes what a step descends along.

    The objective runs on one micro-batch after the other, unless there is but one, or it
    can take them all at once and layers have to come from host memory for it.

    Args:
      graphdef: The graphdef of the model, from `split`.
      objective: What is minimized.
      checkpoint: What backward recomputes.
      sums: An optax.trace that adds up what is handed to it, maybe in host memory.
      router_aux_loss: See `make_train_step`.

    Returns:
      (lora, base, batch, key, factor) -> (loss, metrics, gradients), all sums over the
      micro-batches of a 3-D batch; loss and gradients are multiplied by `factor`.
    """
    if router_aux_loss:
        objective = balanced(objective, router_aux_loss)
    apply = applied(graphdef, objective, checkpoint)

    def gradient(lora, base, batch, key, factor):
        def scaled(lora, batch, index):
            own = key
            if key is not None and index is not None:  # not all of them at once
                own = jax.random.fold_in(key, index)
            loss, metrics = apply(lora, base, batch, own)
            return loss * factor, metrics

        differentiated = jax.value_and_grad(scaled, has_aux=True)

        def add(carry, xs):
            (loss, metrics), grads = differentiated(lora, *xs)
            return (carry[0] + loss, sums.update(grads, carry[1])[1]), metrics

        count = batch["tokens"].shape[0]
        if count == 1:
            first = {name: x[0] for name, x in batch.items()}
            (loss, metrics), grads = differentiated(lora, first, 0)
        elif objective.takes_micro_axis and rests_on_host(base):
            (loss, metrics), grads = differentiated(lora, batch, None)
        else:
            xs = batch, jnp.arange(count)
            start = jnp.float32(0), sums.init(lora)
            (loss, summed), each = jax.lax.scan(add, start, xs)
            metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
            grads = jax.device_put(summed.trace, jax.memory.Space.Device)
        return loss, metrics, grads

    return gradient


def applied(
    graphdef: nnx.GraphDef, objective: Objective, checkpoint: Checkpoint
) -> Callable[[nnx.State, nnx.State, Batch, Array | None], tuple[Array, dict]]:
    """Returns an objective as a function of a model's parts.

    Returns:
      (lora, base, batch, key) -> (sum of losses, sums behind the metrics). It raises
      ConfigError of a model that changes variables of its own.
    """

    def of_parts(lora, base, batch, key):
        model = join(graphdef, lora, base)
        sums = objective(model, batch, key, checkpoint)
        _check_unchanged(model, lora, base)
        return sums

    return of_parts


def _check_unchanged(model: Any, *states: nnx.State) -> None:
    """Refuses a model that has changed variables of its own while it ran.

    A step returns the adapter alone, so that dropout would draw the same at every step, and
    statistics of batches would be lost.

    Raises:
      ConfigError: with the modules.
    """
    now = dict(nnx.to_flat_state(nnx.state(model)))
    changed = [
        path
        for state in states
        for path, before in nnx.to_flat_state(state)
        if any(map(operator.is_not, *map(jax.tree.leaves, (before, now[path]))))
    ]
    if not changed:
        return
    modules = {
        p: node for p, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)
    }
    names = set()
    for path in changed:
        owner = next(path[:i] for i in range(len(path), -1, -1) if path[:i] in modules)
        names.add(f"{in_words(owner) or 'the model'} ({type(modules[owner]).__name__})")
    raise ConfigError(
        f"{', '.join(sorted(names))}: variables of the frozen base change as the model runs, "
        "and a step returns the adapter alone; call model.eval() before split, which switches "
        "dropout and the statistics of batches off"
    )
