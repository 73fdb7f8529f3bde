"""The feed-forward that all tokens take, gated or not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import MLPSpec
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """The feed-forward: down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    Attributes:
      width: Features that down takes.
      gate_proj, up_proj, down_proj: Its linears; or gate_up_proj in place of the first two.
        What is not gated has no gate_proj.
    """

    def __init__(
        self,
        spec: MLPSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        normal: Any = None,
    ):
        del normal
        hidden = config.hidden_size
        wide = self.width = spec.intermediate_size or config.intermediate_size
        self.fused, self.gated = config.fused_gate_up, config.gated
        self.activation, self.clamped = config.activation, config.clamped_swiglu
        bias = config.mlp_bias
        if self.fused:
            self.gate_up_proj = linear(2 * wide, hidden, bias)
        else:
            if self.gated:
                self.gate_proj = linear(wide, hidden, bias)
            self.up_proj = linear(wide, hidden, bias)
        self.down_proj = linear(hidden, wide, bias)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        if self.fused:
            return {"gate_up": 2 * self.width}
        return ({"gate": self.width} if self.gated else {}) | {"up": self.width}

    def __call__(
        self, x: Float[Array, "*batch hidden"], key: Array | None = None
    ) -> Float[Array, "*batch hidden"]:
        """Applies the projections."""
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            up = checkpoint_name(project(self.up_proj, x, key, 5), "up")
            return project(self.down_proj, act(up), key, 6)
        if self.fused:
            both = checkpoint_name(project(self.gate_up_proj, x, key, 4), "gate_up")
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = checkpoint_name(project(self.gate_proj, x, key, 4), "gate")
            up = checkpoint_name(project(self.up_proj, x, key, 5), "up")
        return project(self.down_proj, self._gated(gate, up), key, 6)

    def _gated(self, gate: Array, up: Array) -> Array:
        if self.clamped is None:
            return ACTIVATIONS[self.activation](gate) * up
        alpha, limit = self.clamped
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
