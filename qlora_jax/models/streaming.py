"""stream: a base whose layers wait in host memory.

The scan over layers brings each layer's weights to the device when it is due (and again in
backward), so that the device holds one layer, the embedding and the head. A step moves the
layers' bytes twice over PCIe, 8B at 4.127 bits a weight 2 x 3.6 GB; at 50 GB/s that is 0.14 s,
which hides behind the arithmetic once a step has enough tokens (scripts/BENCHMARKS.md).
"""

from typing import Any

import jax
from flax import nnx

LAYERS = "layers"


def stream(base: nnx.State) -> nnx.State:
    """Puts the layers' weights of a base in pinned host memory.

    Args:
      base: From `split`. Its arrays may be donated to no one else meanwhile.

    Returns:
      The same State, for the same train step.
    """

    def place(path: tuple, variable: Any) -> Any:
        if str(path[0]) != LAYERS:
            return variable
        value = jax.tree.map(_to_host, variable.get_value())
        return variable.replace(value)

    flat = [(path, place(path, v)) for path, v in nnx.to_flat_state(base)]
    return nnx.from_flat_state(flat)


def _to_host(x: jax.Array) -> jax.Array:
    if x.sharding.memory_kind == "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
