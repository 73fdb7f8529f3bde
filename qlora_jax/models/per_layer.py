"""Per-layer embeddings (Gemma 3n, Gemma 4 E2B and E4B) give each layer an input of its own.

A second table has a row a token, and a part of it for each layer. To that a projection of
the token's embedding is added. Behind its feed-forward a layer multiplies a gate by its
part, projects the product to the hidden size and adds it to the residual stream.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.feed_forward.mlp import ACTIVATIONS
from qlora_jax.nn.embedding import Embedding
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm


class PerLayerInputs(nnx.Module):
    """Makes the parts of all layers, of tokens and their embeddings.

    Parts of it are called what transformers calls them, as targets of adapters are.

    Attributes:
      config: The decoder's shape.
      embed_tokens_per_layer: The table, (vocab, layers * features).
      per_layer_model_projection: Linear, from the hidden size to that of a row.
      per_layer_projection_norm: Norm of what it makes for one layer.
    """

    def __init__(
        self,
        config: DecoderConfig,
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        self.config = config
        row = config.num_layers * config.per_layer_size
        self.embed_tokens_per_layer: Any = Embedding(
            normal(config.per_layer_vocab, row)
        )
        self.per_layer_model_projection: Any = Linear(normal(row, config.hidden_size))
        self.per_layer_projection_norm = norm(config.per_layer_size)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        x: Float[Array, "batch seq hidden"],
        key: Array | None = None,
    ) -> Float[Array, "layers batch seq features"]:
        """Returns the part of each layer.

        Args:
          tokens: Token ids.
          x: Their embeddings, scaled.
          key: The random key for LoRA dropout; None switches it off.
        """
        c = self.config
        each = lambda y: y.reshape(*tokens.shape, c.num_layers, -1)  # noqa: E731
        table = each(self.embed_tokens_per_layer(tokens).astype(x.dtype))
        table = table * jnp.asarray(c.per_layer_size**0.5, x.dtype)
        made = project(self.per_layer_model_projection, x, key, 0)
        made = made * jnp.asarray(c.hidden_size**-0.5, x.dtype)
        made = self.per_layer_projection_norm(each(made))
        return jnp.moveaxis((made + table) * jnp.asarray(2**-0.5, x.dtype), 2, 0)


class PerLayerGate(nnx.Module):
    """Adds a layer's part to its residual stream.

    Attributes:
      activation: The name of the gate's activation.
      size: Features of the part.
      per_layer_input_gate, per_layer_projection: Linears, into the size of the part and back.
      post_per_layer_input_norm: Norm of what is added.
    """

    def __init__(
        self,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
    ):
        self.activation, self.hidden = config.activation, config.hidden_size
        self.size = config.per_layer_size
        self.per_layer_input_gate = linear(self.size, self.hidden, False)
        self.per_layer_projection = linear(self.hidden, self.size, False)
        self.post_per_layer_input_norm = norm(self.hidden)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        return {"per_layer": self.size, "unnormed": self.hidden}

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        part: Float[Array, "batch seq features"],
        key: Array | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """Returns the stream with the layer's part added."""
        gate = checkpoint_name(
            project(self.per_layer_input_gate, x, key, 8), "per_layer"
        )
        gated = ACTIVATIONS[self.activation](gate) * part
        y = checkpoint_name(
            project(self.per_layer_projection, gated, key, 9), "unnormed"
        )
        return x + self.post_per_layer_input_norm(y)
