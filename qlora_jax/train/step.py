"""The train step: one jitted function from adapter and batch to adapter and metrics."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError
from qlora_jax.objectives import SFT, Objective
from qlora_jax.objectives.base import Batch, predicted
from qlora_jax.optim import LossScaleState, offload
from qlora_jax.train.gradient import applied, make_gradient

LossFn = Callable[[Any, Batch, Array | None], Float[Array, ""]]
"""(model, batch, dropout key) -> the sum of weighted losses over a 2-D batch."""

logger = logging.getLogger(__name__)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    checkpoint: Checkpoint = "none",
    loss_fn: LossFn | None = None,
    objective: Objective | None = None,
    sums_on_host: bool = False,
    router_aux_loss: float = 0.0,
) -> Callable[..., tuple[nnx.State, Any, dict[str, Array]]]:
    """Makes the train step of a model that was taken apart by `split`.

    Micro-batches of a 3-D batch are accumulated inside the compiled step: loss and gradient
    are those of one big batch. Where layers come from host memory (`stream`), all of them
    go through a layer before the next, so that it is copied twice a step, however many
    there are, if the objective allows it. With `tx` made by `dynamic_loss_scale` the loss
    is scaled by its state.

    Args:
      graphdef: The graphdef of the model, from `split`.
      tx: Any optax transform; see `offload` for keeping its state in host memory.
      checkpoint: What backward recomputes: 'none' elementwise work only, 'layer' each whole
        layer (less memory, about a third more work), 'attention' all of a layer but
        attention's output; 'host' is 'layer' with the layers' inputs in host memory.
      loss_fn: Replaces the next-token cross-entropy; it runs the model itself, so that
        `checkpoint` does not reach it, and sees one micro-batch at a time.
      objective: Replaces it too (`qlora_jax.objectives`); give one or the other.
      sums_on_host: Keep in host memory what micro-batches' gradients add up to, until the
        last of them. Streamed micro-batches add theirs up as they are made.
      router_aux_loss: The load-balance loss of a mixture's routers is added to the loss,
        multiplied by it; 0 for none (train/router_loss.py).

    Returns:
      train_step(lora, base, opt_state, batch, key=None) -> (lora, opt_state, metrics).
      `lora` and `opt_state` are donated. `key` switches LoRA dropout on. Metrics are
      float32 scalars: loss (mean a token), grad_norm (before clipping), tokens (sum of
      weights), those of the objective, router_aux_loss where that is asked for, and with loss
      scaling loss_scale and skipped. Its first call raises ConfigError of a model whose own
      variables change as it runs (dropout, statistics of batches), of an objective that cannot
      be used, and of a model without the routers that router_aux_loss is for.
    """
    chosen = _objective(objective, loss_fn, checkpoint)
    plain = optax.trace(1.0)  # a running sum
    adder: Any = offload(plain) if sums_on_host else plain
    gradient = make_gradient(graphdef, chosen, checkpoint, adder, router_aux_loss)

    def train_step(lora, base, opt_state, batch, key=None):
        chosen.check(batch)
        batch = chosen.prepared(_with_micro_axis(batch))
        scale = opt_state.scale if isinstance(opt_state, LossScaleState) else 1.0
        tokens = predicted(batch)
        normalizer = jnp.maximum(chosen.normalizer_of(batch), 1.0)
        loss, sums, grads = gradient(lora, base, batch, key, scale / normalizer)
        updates, new_state = tx.update(grads, opt_state, lora)
        lora = optax.apply_updates(lora, updates)
        metrics = {
            "loss": loss / scale,
            "grad_norm": optax.tree.norm(grads) / scale,
            "tokens": tokens,
            **{name: _mean(x, normalizer) for name, x in sums.items()},
            **_of_loss_scale(new_state),
        }
        return lora, new_state, metrics

    return _compiled_once(jax.jit(train_step, donate_argnums=(0, 2)))


def make_eval_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn | None = None,
    *,
    objective: Objective | None = None,
) -> Callable[..., tuple[Array, Array, dict[str, tuple[Array, Array]]]]:
    """Makes eval_step(lora, base, batch) -> (sum of losses, its normalizer, metrics).

    The batch is 2-D. Metrics are the objective's, each a sum and its own normalizer, so that
    both add up over batches.

    Args:
      graphdef: The graphdef of the model, from `split`.
      loss_fn: See `make_train_step`.
      objective: See `make_train_step`. The normalizer is the objective's, the sum of the
        weights of predicted tokens unless it has another.
    """
    chosen = _objective(objective, loss_fn)
    apply = applied(graphdef, chosen, "none")

    def eval_step(lora, base, batch):
        batch = chosen.prepared(batch)
        loss, sums = apply(lora, base, batch, None)
        normalizer = chosen.normalizer_of(batch)
        each = {
            name: x if isinstance(x, tuple) else (x, normalizer)
            for name, x in sums.items()
        }
        return loss, normalizer, each

    return jax.jit(eval_step)


def _objective(
    objective: Objective | None, loss_fn: LossFn | None, checkpoint: Checkpoint = "none"
) -> Objective:
    """Returns what is minimized; a loss_fn becomes an objective of one micro-batch.

    Raises:
      ConfigError: both are given.
    """
    if loss_fn is None:
        return SFT if objective is None else objective
    if objective is not None:
        raise ConfigError(
            f"a loss_fn and the objective {objective.name} are given, and a step minimizes "
            "one; drop one of them"
        )
    if checkpoint != "none":
        logger.warning(
            "checkpoint=%r does not reach a loss_fn, which runs the model itself; give it to "
            "the model's hidden_states there, or give an objective",
            checkpoint,
        )

    def loss(model: Any, batch: Batch, key: Array | None, _: Checkpoint) -> tuple:
        return loss_fn(model, batch, key), {}

    return Objective(name=getattr(loss_fn, "__name__", "loss_fn"), loss=loss)


def _with_micro_axis(batch: Batch) -> dict[str, Array]:
    """Returns a 2-D batch as one of a single micro-batch."""
    several = batch["tokens"].ndim == 3
    return {name: x if several else x[None] for name, x in batch.items()}


def _of_loss_scale(opt_state: Any) -> dict[str, Array]:
    """Returns the metrics of dynamic loss scaling, where there is any."""
    if not isinstance(opt_state, LossScaleState):
        return {}
    return {"loss_scale": opt_state.scale, "skipped": opt_state.skipped}


def _mean(sums: Any, normalizer: Array) -> Array:
    """Returns a metric: a sum by the loss's normalizer, or by its own (0 where that is 0)."""
    if not isinstance(sums, tuple):
        return sums / normalizer
    total, own = sums
    return jnp.where(own == 0, 0, total / jnp.where(own == 0, 1, own))


def _compiled_once(jitted: Any) -> Any:
    """Returns a jitted step whose second call is not another program than its first.

    A step's results are committed to their device where any argument was, such as layers or
    optimizer state that were put into host memory. An adapter or a count of steps that is
    not committed at first would then be so from the second step on, which is another
    program to jax. Here they are committed before the first.
    """

    @functools.wraps(jitted.__wrapped__)
    def train_step(lora, base, opt_state, batch, key=None):
        arguments = (lora, base, opt_state, batch, key)
        arrays = [x for x in jax.tree.leaves(arguments) if _is_concrete(x)]
        committed = [x for x in arrays if x.committed]
        if 0 < len(committed) < len(arrays):
            devices = committed[0].sharding.device_set
            commit = functools.partial(_commit, devices=devices)
            lora, opt_state = jax.tree.map(commit, (lora, opt_state))
        return jitted(lora, base, opt_state, batch, key)

    step: Any = train_step
    step.lower, step.trace = jitted.lower, jitted.trace
    step._cache_size = jitted._cache_size
    return step


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _commit(x: Any, devices: set[Any]) -> Any:
    """Commits an array to where it is; one that jax has yet to spread stays as it is."""
    if not _is_concrete(x) or x.committed or x.sharding.device_set != devices:
        return x
    return jax.device_put(x, x.sharding)
