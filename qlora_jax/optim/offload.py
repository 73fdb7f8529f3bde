"""offload: optimizer state that lives in host memory between steps.

What paged optimizers are for, said as placement (contract C5): the state's arrays rest in
pinned host memory, and come to the device slice by slice while they are updated. A scan
over the leading axis (layers) does that: each step of it brings the slices of all arrays,
updates, and sends them back, so that the device never holds more of the state than a
layer's. Copying whole arrays would hold all of it at the peak, since XLA starts them
together.

Slices can be updated one by one only where the transform treats elements alike, as Adam,
Lion and SGD do. Whatever looks across an array (clipping by the global norm) belongs
before: `optax.chain(optax.clip_by_global_norm(1.0), offload(optax.adamw(2e-4)))`. Inside,
it still works, with the whole state on the device during the update.

Numbers do not depend on where the state rests: `offload(inner, "device")` goes by the same
slices, bit for bit. Those of `inner` by itself differ in the last bit here and there, as XLA
contracts products and sums by loop.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr

from qlora_jax.errors import ConfigError

logger = logging.getLogger(__name__)

_SPACES = {
    "pinned_host": jax.memory.Space.Host,
    "device": jax.memory.Space.Device,
}
_MOST_SLICES = 128
"""An array is copied in at most so many slices along its leading axis; one with more rows
takes several rows a slice."""

_ELEMENTWISE = frozenset(
    "abs add add_any and clamp convert_element_type copy copy_p cos device_put div eq exp "
    "exp2 expm1 ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg "
    "not or pow rem round rsqrt select_n sign sin sqrt square stop_gradient sub tanh "
    "xor".split()
)
"""Primitives that treat every element alike."""


def offload(
    inner: optax.GradientTransformation,
    memory_kind: str = "pinned_host",
    *,
    resident_bytes: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's state in host memory between steps.

    Arrays go to the host; scalars (step counts) stay on the device. Works inside jit, where
    the transfers become part of the program.

    Args:
      inner: Any optax transform; elementwise ones go slice by slice (module docstring).
      memory_kind: The memory where the state rests: 'pinned_host' or 'device'.
        ('unpinned_host' is refused: inside jit it silently lands on the device.)
      resident_bytes: The most bytes of state that stay on the device all the same, smallest
        arrays first (`plan_memory` says how many fit). More means less to copy in each
        step.

    Returns:
      A transform with the state of `inner`.

    Raises:
      ConfigError: another memory_kind.
    """
    if memory_kind not in _SPACES:
        known = ", ".join(_SPACES)
        raise ConfigError(f"memory_kind is {memory_kind!r}, expected one of {known}")
    inner = optax.with_extra_args_support(inner)
    rest = _SPACES[memory_kind]

    def place(state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        for i in paged(leaves, resident_bytes):
            leaves[i] = jax.device_put(leaves[i], rest)
        return jax.tree.unflatten(structure, leaves)

    def init(params: optax.Params) -> optax.OptState:
        return place(inner.init(params))

    def update(updates, state, params=None, **extra):
        sliced = not extra and _elementwise(inner, updates, state, params)
        if not sliced and rest is jax.memory.Space.Device:
            return inner.update(updates, state, params, **extra)
        if not sliced:
            state = _on_device(state)
            updates, state = inner.update(updates, state, params, **extra)
            return updates, place(state)
        return _by_slices(inner, updates, state, params, rest, resident_bytes)

    return optax.GradientTransformationExtraArgs(init, update)


def paged(leaves: Sequence[Any], resident_bytes: int) -> list[int]:
    """Returns which of a state's leaves rest on the host: arrays, but for the smallest.

    Args:
      leaves: Arrays or shapes.
      resident_bytes: The most bytes that the smallest may take of the device.
    """
    arrays = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf)]
    arrays.sort(key=lambda i: leaves[i].size * leaves[i].dtype.itemsize)
    while arrays and resident_bytes > 0:
        leaf = leaves[arrays[0]]
        resident_bytes -= leaf.size * leaf.dtype.itemsize
        if resident_bytes >= 0:
            arrays.pop(0)
    return sorted(arrays)


def _on_device(tree: Any) -> Any:
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, device) if jnp.ndim(x) else x, tree)


def _elementwise(inner: Any, updates: Any, state: Any, params: Any) -> bool:
    """Whether an update treats every element of its arrays alike."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)),
        (updates, state, params),
    )
    jaxpr = jax.make_jaxpr(inner.update)(*shapes).jaxpr
    reason = _not_elementwise(jaxpr)
    if reason is not None:
        logger.info(
            "offload: the optimizer uses %s across an array, so its whole state comes to "
            "the device; put it before: optax.chain(that, offload(the rest))",
            reason,
        )
    return reason is None


def _not_elementwise(jaxpr: Any) -> str | None:
    """Returns a primitive that mixes the elements of an array, or None."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inside = [p for p in equation.params.values() if isinstance(p, ClosedJaxpr)]
        for closed in inside:
            if (found := _not_elementwise(closed.jaxpr)) is not None:
                return found
        reads = any(getattr(v.aval, "ndim", 0) for v in equation.invars)
        makes = any(getattr(v.aval, "ndim", 0) for v in equation.outvars)
        spread = name == "broadcast_in_dim" and not reads  # of a scalar
        if not inside and (reads or makes) and not spread and name not in _ELEMENTWISE:
            return name
    return None


def _by_slices(
    inner: Any, updates: Any, state: Any, params: Any, rest: Any, resident_bytes: int
) -> tuple[Any, Any]:
    """Updates slice by slice; arrays with as many slices share a scan."""
    grads, grads_tree = jax.tree.flatten(updates)
    old, state_tree = jax.tree.flatten(state)
    weights = None if params is None else jax.tree.leaves(params)
    # Which arrays come and go; all are sliced, so that numbers don't depend on it.
    moving = set(paged(old, resident_bytes))
    if rest is jax.memory.Space.Device:
        moving = set()
    # An array of the state goes with the gradient of its shape.
    counts = {jnp.shape(x): _slices(jnp.shape(x)) for x in old if jnp.ndim(x)}
    new = list(old)
    for count in sorted({counts.get(jnp.shape(g), 0) for g in grads}):
        mine = [i for i, g in enumerate(grads) if counts.get(jnp.shape(g), 0) == count]
        theirs = [
            i
            for i, x in enumerate(old)
            if not jnp.ndim(x) or counts.get(jnp.shape(x), 0) == count
        ]

        def update(
            g: list[Any], s: list[Any], p: list[Any] | None, i=mine, j=theirs
        ) -> tuple[list[Any], list[Any]]:
            stepped = inner.update(
                _only(g, i, len(grads), grads_tree),
                _only(s, j, len(old), state_tree),
                None if p is None else _only(p, i, len(grads), grads_tree),
            )
            u, s = map(jax.tree.leaves, stepped)
            return u, s

        g, s = [grads[i] for i in mine], [old[i] for i in theirs]
        p = None if weights is None else [weights[i] for i in mine]
        away = [i in moving for i in theirs]
        u, s = _scan(update, count, g, s, p, away) if count else update(g, s, p)
        for i, x in zip(mine, u, strict=True):
            grads[i] = x
        for i, x in zip(theirs, s, strict=True):
            new[i] = x
    return jax.tree.unflatten(grads_tree, grads), jax.tree.unflatten(state_tree, new)


def _only(leaves: list[Any], places: list[int], count: int, tree: Any) -> Any:
    """Returns a tree with leaves in some places and nothing (no leaf) in the others."""
    filled: list[Any] = [optax.MaskedNode()] * count
    for place, leaf in zip(places, leaves, strict=True):
        filled[place] = leaf
    return jax.tree.unflatten(tree, filled)


def _slices(shape: tuple[int, ...]) -> int:
    """Returns how many slices an array is updated in: a divisor of its leading axis."""
    most = min(shape[0], _MOST_SLICES)
    return max(n for n in range(1, most + 1) if shape[0] % n == 0)


def _scan(
    update: Any,
    count: int,
    grads: list[Any],
    state: list[Any],
    weights: list[Any] | None,
    away: list[bool],
) -> tuple[list[Any], list[Any]]:
    """Runs an update over slices; arrays of the state that are `away` come and go.

    Gradients and state are the scan's carry: updates take the gradients' place, the new
    state that of the old, so that neither needs memory of its own.
    """

    def cut(x: Any) -> Any:
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    def take(x: Any, i: Any) -> Any:
        return lax.dynamic_index_in_dim(x, i, keepdims=False)

    def put(x: Any, y: Any, i: Any) -> Any:
        return lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0)

    device, host = jax.memory.Space.Device, jax.memory.Space.Host
    scalars = [x for x in state if not jnp.ndim(x)]
    arrays = [cut(x) for x in state if jnp.ndim(x)]
    there = [a for a, x in zip(away, state, strict=True) if jnp.ndim(x)]

    def body(carry: Any, xs: tuple) -> tuple[Any, list[Any]]:
        gs, ss = carry
        i, p = xs
        slices = [take(x, i) for x in ss]
        brought = iter(
            jax.device_put(x, device) if t else x
            for x, t in zip(slices, there, strict=True)
        )
        plain = iter(scalars)
        s = [next(brought if jnp.ndim(x) else plain) for x in state]
        u, s = update([take(x, i) for x in gs], s, p)
        back = [x for x, y in zip(s, state, strict=True) if jnp.ndim(y)]
        back = [
            jax.device_put(x, host) if t else x
            for x, t in zip(back, there, strict=True)
        ]
        gs = [put(x, y, i) for x, y in zip(gs, u, strict=True)]
        ss = [put(x, y, i) for x, y in zip(ss, back, strict=True)]
        return (gs, ss), [x for x, y in zip(s, state, strict=True) if not jnp.ndim(y)]

    slices = None if weights is None else [cut(x) for x in weights]
    (u, arrays), scalars = lax.scan(
        body, ([cut(x) for x in grads], arrays), (jnp.arange(count), slices)
    )
    u = [x.reshape(y.shape) for x, y in zip(u, grads, strict=True)]
    array, scalar = iter(arrays), iter(scalars)
    new = [
        next(array).reshape(x.shape) if jnp.ndim(x) else next(scalar)[0] for x in state
    ]
    return u, new
