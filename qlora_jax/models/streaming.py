"""stream: a base whose layers wait in host memory.

The scan over layers brings each layer's weights to the device when it is due (and again in
backward), so that the device holds a layer, the embedding and the head; a second layer where
`copies_ahead`. A step moves the layers' bytes twice over PCIe, 8B at 4.127 bits a weight
2 x 3.6 GB; at 44 GB/s that is 0.16 s, which hides behind the arithmetic once a step has
enough tokens (scripts/BENCHMARKS.md).
"""

import functools
from collections.abc import Callable, Sequence
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
      base: The base, from `split`. Do not donate its arrays elsewhere while the returned
        State is in use: both share those that are not moved.

    Returns:
      A State of the same structure, for the same train step.
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


def copies_ahead(layers: int, micro_batches: int, checkpoint: str | None) -> bool:
    """Whether a streamed base's next layer is copied while one computes (`scan_ahead`).

    It is where backward needs no more of a layer than its input. Where several micro-batches
    go through a layer together it is not: the copy is a small part of their turn, and the
    inputs of all of them, copied ahead too, took 0.2 GB more a micro-batch of 2048 tokens of
    70B (scripts/results/README.md).

    Args:
      layers: The number of layers that follow each other in a segment.
      micro_batches: The number of micro-batches that go through a layer before the next
        one.
      checkpoint: What backward recomputes; None where there is no backward.
    """
    return micro_batches == 1 and checkpoint in ("layer", "host") and layers > 1


def scan_ahead(
    apply: Callable[[int, Any, Any, Array, Any, Any], Array],
    x: Array,
    given: Any,
    trained: Sequence[Any],
    base: Sequence[Any],
    extra: Sequence[Any],
    *,
    inputs_on_host: bool,
) -> Array:
    """Applies layers whose weights wait in host memory, each copied one layer ahead.

    Gives what lax.scan over the checkpointed layers gives. There a layer's copies have only
    its own turn, which begins with waiting for them; and weights in the carry, for the turn
    after, would be kept for backward, of every layer. So backward is written out: it copies
    ahead as well, and keeps the layers' inputs alone.

    XLA copies by DMA, beside the kernels, what it can prove to be a slice that moves on by
    as much each turn (its dynamic_slice_config); so the index is a counter that never leaves
    the stack, and the last repeat comes after the loop.

    Args:
      apply: (slot, trained, base, x, given, extra) -> x; but for `given`, which is all
        layers', these are a layer's.
      x: The first layer's input, (batch, seq, hidden).
      given: What all layers see and is differentiated too, such as an earlier layer's keys.
      trained: For each slot of a pattern, what is differentiated besides x; every leaf has
        a leading axis of repeats.
      base: For each slot its frozen weights, in host memory, the same.
      extra: For each slot what is not differentiated, the same.
      inputs_on_host: Whether the layers' inputs wait for backward in host memory.

    Returns:
      The last layer's output, (batch, seq, hidden).
    """
    slots, last = len(base), len(jax.tree.leaves(base[0])[0]) - 1
    trained, base, extra = list(trained), list(base), list(extra)

    def forward(
        x: Array, given: Any, trained: Any, base: Any, extra: Any
    ) -> tuple[Array, Any]:
        def repeat(i: Array, x: Array, layer: Any, more: bool) -> tuple[Any, ...]:
            inputs = []
            for j in range(slots):
                inputs.append(x)
                following = None
                if j + 1 < slots:
                    following = _fetch(base[j + 1], i)
                elif more:
                    following = _fetch(base[0], i + 1)
                own = at(trained[j], i), _first(layer), x, given, at(extra[j], i)
                y = apply(j, *own)
                # Without it XLA fuses a last layer with what follows, and does not round to
                # y's dtype as a loop does.
                x, layer = lax.optimization_barrier((y, following))
            return x, layer, inputs

        def turn(carry: Any, _: None) -> tuple[Any, list[Array]]:
            i, x, layer = carry
            x, layer, inputs = repeat(i, x, layer, True)
            if inputs_on_host:
                inputs = jax.device_put(inputs, jax.memory.Space.Host)
            return (i + 1, x, layer), inputs

        start = jnp.int32(0), x, _fetch(base[0], 0)
        (i, x, layer), inputs = _loop(turn, start, last)
        y, _, final = repeat(i, x, layer, False)
        return y, (inputs, final, given, trained, base, extra)

    def backward(kept: Any, dy: Array) -> tuple[Any, ...]:
        inputs, final, given, trained, base, extra = kept

        def layer_back(
            j: int, i: Array, back: Any, grads: Any, layer: Any, x: Array
        ) -> tuple[Any, Any]:
            dy, d_given = back

            def layer_of(trained: Any, given: Any, x: Array) -> Array:
                return apply(j, trained, _first(layer), x, given, at(extra[j], i))

            own = at(trained[j], i), given, x
            d_trained, more, dx = jax.vjp(layer_of, *own)[1](dy)
            put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
            d_given = jax.tree.map(jnp.add, d_given, more)
            return (dx, d_given), jax.tree.map(put, grads, d_trained)

        def repeat(
            i: Array, back: Any, grads: Any, layer: Any, xs: Any, more: bool
        ) -> tuple[Any, ...]:
            grads, ahead = list(grads), [None] * slots
            for j in reversed(range(slots)):
                following = (
                    _fetch(base[j - 1], i if j else i - 1) if j or more else None
                )
                before = _fetch(inputs[j], i - 1) if more else None
                done = layer_back(j, i, back, grads[j], layer, xs[j][0])
                if following is not None:
                    done, following, before = lax.optimization_barrier(
                        (done, following, before)
                    )
                (back, grads[j]), layer, ahead[j] = done, following, before
            return back, grads, layer, ahead

        def turn(carry: Any, _: None) -> tuple[Any, None]:
            i, *rest = carry
            return (i - 1, *repeat(i, *rest, more=True)), None

        d_given, zeros = jax.tree.map(jnp.zeros_like, (given, trained))
        xs = [x[None] for x in final]
        start = jnp.int32(last), (dy, d_given), zeros, _fetch(base[-1], last), xs
        carry, _ = _loop(turn, start, last)
        (dx, d_given), grads, _, _ = repeat(*carry, more=False)
        return dx, d_given, grads, None, None

    applied = jax.custom_vjp(lambda *args: forward(*args)[0])
    applied.defvjp(forward, backward)
    return applied(x, given, trained, base, extra)


def _loop(turn: Callable[..., Any], start: Any, length: int) -> tuple[Any, Any]:
    """Scans over nothing but a carry; no turn at all is not even traced."""
    return lax.scan(turn, start, length=length) if length else (start, None)


def _fetch(stack: Any, i: Any) -> Any:
    """Copies one layer to the device, its leading axis kept: a reshape would wait for it."""

    def cut(leaf: Array) -> Array:
        start = (i, *(0,) * (leaf.ndim - 1))
        size = (1, *leaf.shape[1:])
        return lax.dynamic_slice(leaf, start, size, allow_negative_indices=False)

    return arrive(jax.tree.map(cut, stack))


def _first(layer: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], layer)


def at(stack: Any, i: Array) -> Any:
    """Cuts one layer out of a stack."""

    def cut(leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, i, keepdims=False)

    return jax.tree.map(cut, stack)
