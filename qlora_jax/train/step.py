"""The train step: one jitted function from adapter and batch to adapter and metrics."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from qlora_jax.adapters import join
from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError
from qlora_jax.names import dotted
from qlora_jax.nn.variables import rests_on_host
from qlora_jax.optim import LossScaleState, offload
from qlora_jax.train.loss import cross_entropy

Batch = Mapping[str, Any]
"""tokens: int32 (batch, seq), or (accumulation, micro-batch, seq); padding right.
weights: float32 of the same shape: what predicting each token counts; the first of a
row has nothing to predict it and is ignored."""

LossFn = Callable[[Any, Batch, Array | None], Float[Array, ""]]
"""(model, batch, dropout key) -> the sum of weighted losses over a 2-D batch."""


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    checkpoint: Checkpoint = "none",
    loss_fn: LossFn | None = None,
    sums_on_host: bool = False,
) -> Callable[..., tuple[nnx.State, Any, dict[str, Array]]]:
    """Makes the train step of a model that was taken apart by `split`.

    Micro-batches of a 3-D batch are accumulated inside the compiled step and weighted
    by tokens: the loss and gradient are those of one big batch. Where layers come from
    host memory (`stream`), all micro-batches go through a layer before the next, so that it
    is copied twice a step, however many there are; a `loss_fn` of one's own goes by
    micro-batches, each with its own copies. With `tx` made by `dynamic_loss_scale` the loss
    is scaled by its state.

    Args:
      graphdef: Of the model.
      tx: Any optax transform; see `offload` for keeping its state in host memory.
      checkpoint: What backward recomputes: 'none' elementwise work only, 'layer' each
        whole layer (less memory, about a third more work).
      loss_fn: Replaces the next-token cross-entropy.
      sums_on_host: Keep in host memory what micro-batches' gradients add up to, until the
        last of them. Streamed micro-batches add theirs up as they are made.

    Returns:
      train_step(lora, base, opt_state, batch, key=None) -> (lora, opt_state, metrics).
      `lora` and `opt_state` are donated. `key` switches LoRA dropout on. Metrics are
      float32 scalars: loss (mean a token), grad_norm (before clipping), tokens (sum of
      weights), and with loss scaling loss_scale and skipped. Its first call raises
      ConfigError of a model whose own variables change as it runs (dropout, statistics of
      batches).
    """
    default = loss_fn is None
    loss_fn = loss_fn or next_token_loss(checkpoint)
    plain = optax.trace(1.0)  # a running sum
    sums: Any = offload(plain) if sums_on_host else plain

    def train_step(lora, base, opt_state, batch, key=None):
        batch = dict(batch)
        if batch["tokens"].ndim == 2:
            batch = {name: x[None] for name, x in batch.items()}
        scaled = isinstance(opt_state, LossScaleState)
        tokens = jnp.sum(batch["weights"][:, :, 1:])
        factor = (opt_state.scale if scaled else 1.0) / jnp.maximum(tokens, 1.0)

        def loss_of(lora, micro, index):
            micro_key = None if key is None else jax.random.fold_in(key, index)
            model = join(graphdef, lora, base)
            loss = loss_fn(model, micro, micro_key) * factor
            _check_unchanged(model, lora, base)
            return loss

        def add(carry, xs):
            loss, grads = jax.value_and_grad(loss_of)(lora, *xs)
            return (carry[0] + loss, sums.update(grads, carry[1])[1]), None

        def loss_together(lora):
            model = join(graphdef, lora, base)
            losses = next_token_losses(model, batch, key, checkpoint)
            return functools.reduce(jnp.add, [loss * factor for loss in losses])

        count = batch["tokens"].shape[0]
        if count > 1 and default and rests_on_host(base):
            loss, grads = jax.value_and_grad(loss_together)(lora)
        elif count == 1:
            first = {name: x[0] for name, x in batch.items()}
            loss, grads = jax.value_and_grad(loss_of)(lora, first, 0)
        else:
            xs = (batch, jnp.arange(count))
            start = jnp.float32(0), sums.init(lora)
            (loss, summed), _ = jax.lax.scan(add, start, xs)
            grads = jax.device_put(summed.trace, jax.memory.Space.Device)
        updates, new_state = tx.update(grads, opt_state, lora)
        lora = optax.apply_updates(lora, updates)
        scale = opt_state.scale if scaled else 1.0
        metrics = {
            "loss": loss / scale,
            "grad_norm": optax.tree.norm(grads) / scale,
            "tokens": tokens,
        }
        if scaled:
            after = cast(LossScaleState, new_state)
            metrics |= {"loss_scale": after.scale, "skipped": after.skipped}
        return lora, new_state, metrics

    return _compiled_once(jax.jit(train_step, donate_argnums=(0, 2)))


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


def make_eval_step(
    graphdef: nnx.GraphDef, loss_fn: LossFn | None = None
) -> Callable[..., tuple[Array, Array]]:
    """Makes eval_step(lora, base, batch) -> (sum of losses, sum of weights)."""
    loss_fn = loss_fn or next_token_loss("none")

    def eval_step(lora, base, batch):
        model = join(graphdef, lora, base)
        loss = loss_fn(model, batch, None)
        _check_unchanged(model, lora, base)
        return loss, jnp.sum(batch["weights"][:, 1:])

    return jax.jit(eval_step)


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
        names.add(f"{dotted(owner) or 'the model'} ({type(modules[owner]).__name__})")
    raise ConfigError(
        f"{', '.join(sorted(names))}: variables of the frozen base change as the model runs, "
        "and a step returns the adapter alone; call model.eval() before split, which switches "
        "dropout and the statistics of batches off"
    )


def next_token_loss(checkpoint: Checkpoint) -> LossFn:
    """Returns the cross-entropy of each token given those before it."""

    def loss_fn(model: Any, batch: Batch, key: Array | None) -> Float[Array, ""]:
        hidden = model.hidden_states(batch["tokens"], key=key, checkpoint=checkpoint)
        return token_loss(model.head, hidden, batch)

    return loss_fn


def next_token_losses(
    model: Any, batch: Batch, key: Array | None, checkpoint: Checkpoint
) -> Float[Array, " micro"]:
    """Returns `next_token_loss` of each micro-batch; the layers see all of them at once."""
    hidden = model.hidden_states(batch["tokens"], key=key, checkpoint=checkpoint)

    def one(_, xs):
        return None, token_loss(model.head, *xs)

    return jax.lax.scan(one, None, (hidden, batch), reverse=True)[1]


def token_loss(head: Any, hidden: Array, batch: Batch) -> Float[Array, ""]:
    """Returns the cross-entropy of what a head makes of hidden states."""
    # Rolled, not cut, so that shapes stay round; the last position has weight 0.
    labels = jnp.roll(batch["tokens"], -1, axis=1)
    weights = jnp.roll(batch["weights"].at[:, 0].set(0), -1, axis=1)
    return cross_entropy(head, hidden, labels, weights)
