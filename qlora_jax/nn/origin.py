"""What one of our linears was before, where it was a stranger's: a flax.nnx.Linear."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_PLAIN = ("dot_general", "promote_dtype", "preferred_element_type")
"""Fields of nnx.Linear that change what it computes, unless they are as by default."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A flax.nnx.Linear without its arrays; static, so that it can be a module's field.

    Attributes:
      graphdef: The graphdef of the nnx.Linear.
      dtype: The dtype it computes in; None for what inputs and parameters promote to.
      metadata: The metadata of each of its parameters, by the parameter's name.
    """

    graphdef: nnx.GraphDef
    dtype: str | None
    metadata: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    @classmethod
    def of(cls, linear: nnx.Linear) -> "Origin":
        """Keeps what a linear is besides its arrays."""
        dtype = None if linear.dtype is None else jnp.dtype(linear.dtype).name
        metadata = {
            name: tuple(sorted(getattr(linear, name).get_metadata().items()))
            for name in ("kernel", "bias")
            if getattr(linear, name) is not None
        }
        return cls(nnx.graphdef(linear), dtype, tuple(metadata.items()))

    def incoming(self, x: Array, parameters: Any) -> Array:
        """Returns an input in the dtype that the linear computes in."""
        return x.astype(self.dtype or jnp.result_type(x.dtype, parameters))

    def linear(
        self, kernel: Float[Array, "*stack out in"], bias: Array | None
    ) -> nnx.Linear:
        """Returns the nnx.Linear again, with other values and their dtype."""
        arrays = {"kernel": jnp.swapaxes(kernel, -1, -2), "bias": bias}
        state = {
            name: nnx.Param(arrays[name], **dict(metadata))
            for name, metadata in self.metadata
        }
        linear = nnx.merge(self.graphdef, nnx.State(state))
        linear.param_dtype = kernel.dtype
        return linear


def is_plain(node: Any) -> bool:
    """Whether a module is a flax.nnx.Linear that multiplies as one does by default.

    One of a subclass may do more, as nnx.LoRALinear; so may one with a dot_general of its
    own. Of a stack that nnx.vmap made, the layers must be on the first axes.
    """
    if type(node) is not nnx.Linear:
        return False
    standard = _standard()
    own = node.kernel.get_value()
    return own.shape[-2:] == (node.in_features, node.out_features) and all(
        getattr(node, name) is getattr(standard, name) for name in _PLAIN
    )


@functools.cache
def _standard() -> nnx.Linear:
    return nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(jax.random.key(0))))
