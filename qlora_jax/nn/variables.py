"""FrozenParam, the variable of what does not train; how one begins to, or arrives."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class FrozenParam(nnx.Variable):
    """A base weight: never differentiated, optimized or checkpointed.

    Not an nnx.Param, so that a filter on nnx.Param cannot reach it (contract C4). Its
    value may be an array or a whole PackedWeight.
    """


def trained(variable: nnx.Variable) -> nnx.LoRAParam:
    """Returns a float32 copy of a dense weight that trains with the adapter."""
    # A copy even of float32: what trains is donated, the base's array stays.
    return nnx.LoRAParam(jnp.array(variable.get_value(), jnp.float32, copy=True))


def trains(variable: nnx.Variable | None) -> bool:
    """Whether a weight trains with the adapter."""
    return isinstance(variable, nnx.LoRAParam)


def arrive(weights: Any) -> Any:
    """Brings to the device what of a layer's weights rests in host memory.

    Called inside what backward recomputes, so that the copy is made again there and not
    kept.
    """
    device = jax.memory.Space.Device
    return jax.tree.map(
        lambda x: jax.device_put(x, device) if rests_on_host(x) else x, weights
    )


def rests_on_host(tree: Any) -> bool:
    """Whether any array of a tree is in host memory, inside jit too."""
    host = jax.memory.Space.Host
    return any(jax.typeof(x).memory_space == host for x in jax.tree.leaves(tree))
