"""Where a NaN or Inf began: in a weight, a layer's activations, a gradient, or an update."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.adapters.attach import join
from qlora_jax.adapters.names import flatten
from qlora_jax.models import Decoder
from qlora_jax.names import Numbered, dotted
from qlora_jax.objectives import Objective
from qlora_jax.objectives.base import documents_of
from qlora_jax.train.gradient import make_gradient


def first_not_finite(
    graphdef: nnx.GraphDef,
    before: nnx.State,
    after: nnx.State,
    base: nnx.State,
    batch: dict[str, np.ndarray],
    objective: Objective,
    key: jax.Array | None = None,
) -> str | None:
    """Says where the first value that is not finite is, in the order of computation.

    Args:
      graphdef, base: The model's parts that stay, from `split`.
      before: The adapter as a step found it.
      after: The adapter as the step left it.
      batch: What the step was taken on, 2-D or 3-D.
      objective: What was minimized.
      key: The random key of the step, for dropout.

    Returns:
      None where all of it is finite.
    """
    for what, state in (("the base's", base), ("the adapter's", before)):
        names = {dotted(path): v.get_value() for path, v in nnx.to_flat_state(state)}
        if wrong := [name for name, value in names.items() if not _finite(value)]:
            return f"{what} {wrong[0]}, before the step"
    model = join(graphdef, before, base)
    several = batch["tokens"].ndim == 3
    micro = batch if several else {name: x[None] for name, x in batch.items()}
    if isinstance(model, Decoder):
        for i, tokens in enumerate(micro["tokens"]):
            told = {name: x[i] for name, x in documents_of(micro).items()}
            if (place := _first_activation(model, tokens, told)) is not None:
                return place
    gradient = make_gradient(graphdef, objective, "none", optax.trace(1.0))
    loss, _, grads = jax.jit(gradient)(before, base, micro, key, 1.0)
    if not _finite(loss):
        return "the loss, of logits that are finite"
    # Backward goes from the last layer to the first, and each NaN with it.
    if wrong := [name for name, x in flatten(grads).items() if not _finite(x)]:
        return f"the gradient of {max(wrong, key=_layer)}"
    wrong = [name for name, x in flatten(after).items() if not _finite(x)]
    return f"the adapter's {wrong[0]}, after the step's update" if wrong else None


def all_finite(lora: nnx.State) -> bool:
    """Whether every value of an adapter is finite."""
    leaves = jax.tree.leaves(jax.tree.map(lambda x: jnp.isfinite(x).all(), lora))
    return bool(jnp.stack(leaves).all())


def _first_activation(
    model: Decoder, tokens: Any, documents: dict[str, Any]
) -> str | None:
    graphdef, state = nnx.split(model)

    def finite(state: nnx.State, given: dict[str, Any]) -> dict[str, Any]:
        return nnx.merge(graphdef, state).finite(**given)

    found = jax.jit(finite)(state, {"tokens": tokens, **documents})
    return next((name for name, yes in _named(model, found) if not yes), None)


def _named(model: Decoder, found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    yield "the embedding's output", bool(found["embed_tokens"])
    layers = {}
    for (numbers, _), flags in zip(model.config.slots, found["layers"], strict=True):
        layers |= dict(zip(numbers, np.asarray(flags).tolist(), strict=True))
    for number in sorted(layers):
        yield f"the output of layers.{number}", layers[number]
    yield "the last norm's output", bool(found["norm"])
    yield "the logits", bool(found["head"])


def _layer(name: str) -> int:
    numbers = Numbered.parse(name).numbers
    return numbers[0] if numbers else -1


def _finite(value: Any) -> bool:
    leaves = [np.asarray(x) for x in jax.tree.leaves(value)]
    return all(
        np.isfinite(x.astype(np.float32)).all()
        for x in leaves
        if jnp.issubdtype(x.dtype, jnp.floating)
    )
