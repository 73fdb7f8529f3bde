"""offload: optimizer state that lives in host memory between steps.

What paged optimizers are for, said as placement (contract C5): the state's arrays are
put in pinned host memory by `init` and by every `update`, and brought to the device for
the update alone.
"""

from typing import Any

import jax
import optax

from qlora_jax.errors import ConfigError

_SPACES = {
    "pinned_host": jax.memory.Space.Host,
    "device": jax.memory.Space.Device,
}


def offload(
    inner: optax.GradientTransformation, memory_kind: str = "pinned_host"
) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's state in host memory between steps.

    Arrays go to the host; scalars (step counts) stay on the device. Numbers are those
    of `inner`. Works inside jit, where the transfers become part of the program.

    Args:
      inner: Any optax transform.
      memory_kind: Where the state rests: 'pinned_host', or 'device' to switch it off.
        ('unpinned_host' is refused: inside jit it silently lands on the device.)

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

    def place(state: Any, space: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.device_put(x, space) if jax.numpy.ndim(x) else x, state
        )

    def init(params: optax.Params) -> optax.OptState:
        return place(inner.init(params), rest)

    def update(updates, state, params=None, **extra):
        state = place(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, place(state, rest)

    return optax.GradientTransformationExtraArgs(init, update)
