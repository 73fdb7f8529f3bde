"""stream: a base whose layers wait in host memory.

The scan over layers brings each layer's weights to the device when it is due (and again in
backward), so that the device holds a layer, the embedding and the head; a second layer where
`copies_ahead`. A step moves the layers' bytes twice over PCIe, 8B at 4.127 bits a weight
2 x 3.6 GB; at 44 GB/s that is 0.16 s, which hides behind the arithmetic once a step has
enough tokens (scripts/BENCHMARKS.md).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from qlora_jax.names import is_stacked
from qlora_jax.nn.variables import arrive


def stream(base: nnx.State) -> nnx.State:
    """Puts the layers' weights of a base in pinned host memory.

    Args:
      base: From `split`. Its arrays may be donated to no one else meanwhile.

    Returns:
      The same State, for the same train step.
    """

    def place(path: tuple, variable: Any) -> Any:
        if not is_stacked(path):
            return variable
        value = jax.tree.map(_to_host, variable.get_value())
        return variable.replace(value)

    flat = [(path, place(path, v)) for path, v in nnx.to_flat_state(base)]
    return nnx.from_flat_state(flat)


def _to_host(x: jax.Array) -> jax.Array:
    if x.sharding.memory_kind == "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def copies_ahead(
    layers: int, period: int, micro_batches: int, checkpoint: str | None
) -> bool:
    """Whether a streamed base's next layer is copied while one computes (`scan_ahead`).

    It is where backward needs no more of a layer than its input, and layers are of one kind.
    Where several micro-batches go through a layer together it is not: the copy is a small
    part of their turn, and the inputs of all of them, copied ahead too, took 0.2 GB more
    a micro-batch of 2048 tokens of 70B (scripts/results/README.md).

    Args:
      layers: Of the model.
      period: After how many layers their kinds repeat.
      micro_batches: That go through a layer before the next does.
      checkpoint: What backward recomputes; None where there is no backward.
    """
    alone = micro_batches == 1 and checkpoint in ("layer", "host")
    return alone and period == 1 and layers > 1


def scan_ahead(
    apply: Callable[[Any, Any, Array, Any], Array],
    x: Array,
    trained: Any,
    base: Any,
    extra: Any,
    *,
    inputs_on_host: bool,
) -> Array:
    """Applies layers whose weights wait in host memory, each copied one turn ahead.

    Gives what lax.scan over the checkpointed layer gives. There a layer's copies have only
    its own turn, which begins with waiting for them; and weights in the carry, for the turn
    after, would be kept for backward, of every layer. So backward is written out: it copies
    ahead as well, and keeps the layers' inputs alone.

    XLA copies by DMA, beside the kernels, what it can prove to be a slice that moves on by
    as much each turn (its dynamic_slice_config); so the index is a counter that never leaves
    the stack, and the last layer's turn comes after the loop.

    Args:
      apply: (trained, base, x, extra), each a layer's, -> x.
      x: The first layer's input, (batch, seq, hidden).
      trained: What is differentiated besides x; every leaf with a leading axis of layers,
        of which there are at least two.
      base: Frozen weights, in host memory, the same.
      extra: Of each layer, not differentiated.
      inputs_on_host: Whether the layers' inputs wait for backward in host memory.

    Returns:
      The last layer's output, (batch, seq, hidden).
    """
    last = len(jax.tree.leaves(base)[0]) - 1

    def forward(x: Array, trained: Any, base: Any, extra: Any) -> tuple[Array, Any]:
        def turn(carry: Any, _: None) -> tuple[Any, Array]:
            i, x, layer = carry
            ahead = _fetch(base, i + 1)
            y = apply(_at(trained, i), _first(layer), x, _at(extra, i))
            kept = jax.device_put(x, jax.memory.Space.Host) if inputs_on_host else x
            return (i + 1, *lax.optimization_barrier((y, ahead))), kept

        start = jnp.int32(0), x, _fetch(base, 0)
        (i, x, layer), inputs = lax.scan(turn, start, length=last)
        y = apply(_at(trained, i), _first(layer), x, _at(extra, i))
        # Else XLA fuses it with what follows, and does not round to y's dtype as a loop does.
        y = lax.optimization_barrier(y)
        return y, (inputs, x, trained, base, extra)

    def backward(kept: Any, dy: Array) -> tuple[Any, ...]:
        inputs, x, trained, base, extra = kept

        def back(i: Array, dy: Array, grads: Any, layer: Any, x: Array) -> Any:
            def layer_of(trained: Any, x: Array) -> Array:
                return apply(trained, _first(layer), x, _at(extra, i))

            d_trained, dx = jax.vjp(layer_of, _at(trained, i), x)[1](dy)
            return dx, jax.tree.map(
                lambda g, d: lax.dynamic_update_index_in_dim(g, d, i, 0),
                grads,
                d_trained,
            )

        def turn(carry: Any, _: None) -> tuple[Any, None]:
            i, dy, grads, layer, x = carry
            ahead = _fetch(base, i - 1), _fetch(inputs, i - 1)
            done = back(i, dy, grads, layer, x[0])
            (dx, grads), ahead = lax.optimization_barrier((done, ahead))
            return (i - 1, dx, grads, *ahead), None

        zeros = jax.tree.map(jnp.zeros_like, trained)
        start = jnp.int32(last), dy, zeros, _fetch(base, last), x[None]
        (i, dy, grads, layer, x), _ = lax.scan(turn, start, length=last)
        dx, grads = back(i, dy, grads, layer, x[0])
        return dx, grads, None, None

    applied = jax.custom_vjp(lambda *args: forward(*args)[0])
    applied.defvjp(forward, backward)
    return applied(x, trained, base, extra)


def _fetch(stack: Any, i: Any) -> Any:
    """Copies one layer to the device, its leading axis kept: a reshape would wait for it."""

    def cut(leaf: Array) -> Array:
        start = (i, *(0,) * (leaf.ndim - 1))
        size = (1, *leaf.shape[1:])
        return lax.dynamic_slice(leaf, start, size, allow_negative_indices=False)

    return arrive(jax.tree.map(cut, stack))


def _first(layer: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], layer)


def _at(stack: Any, i: Array) -> Any:
    def cut(leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, i, keepdims=False)

    return jax.tree.map(cut, stack)
