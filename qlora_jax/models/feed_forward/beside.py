"""A feed-forward that all tokens take, and a mixture beside it, each with norms of its own."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.feed_forward.experts import experts
from qlora_jax.models.feed_forward.mlp import MLP
from qlora_jax.models.spec import BesideSpec, ExpertsSpec, MLPSpec
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.moe import SHARED_KEY
from qlora_jax.nn.norm import BareNorm, RMSNorm
from qlora_jax.nn.vector import Vector


class Beside(MLP):
    """Gemma 4's: a feed-forward of what the layer has normed, and experts of the stream itself.

    Attributes:
      mixture: Experts.
      router_norm, router_scale: What the router sees of the stream is normed without a weight,
        and multiplied by a number for each feature.
      experts_norm: RMSNorm of what the experts take of the stream.
      own_post_norm, experts_post_norm: RMSNorms of what feed-forward and mixture make.
    """

    STREAM: ClassVar = True

    def __init__(
        self,
        spec: BesideSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        normal: Callable[..., Array],
    ):
        super().__init__(MLPSpec(intermediate_size=spec.own_size), config, linear)
        self.hidden, eps = config.hidden_size, config.rms_norm_eps
        mixed = ExpertsSpec(expert_scales=True)
        self.mixture = experts(mixed, config, linear, normal)

        def one() -> Array:
            return jnp.ones_like(normal(self.hidden))

        self.router_norm, self.router_scale = BareNorm(eps), Vector(one())
        self.experts_norm = RMSNorm(one(), eps)
        self.own_post_norm = RMSNorm(one(), eps)
        self.experts_post_norm = RMSNorm(one(), eps)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        kept = {"unnormed": 2 * self.hidden} | super().kept
        for name, size in self.mixture.kept.items():
            kept[name] = kept.get(name, 0) + size
        return kept

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        key: Array | None = None,
        stream: Float[Array, "batch seq hidden"] | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """Adds what both make of x, which is normed, and of the stream, which is not."""
        assert stream is not None
        own_key = None if key is None else jax.random.fold_in(key, SHARED_KEY)
        own = checkpoint_name(super().__call__(x, own_key), "unnormed")
        mixed = self.mixture(self.experts_norm(stream), key, self._seen(stream))
        mixed = checkpoint_name(mixed, "unnormed")
        return self.own_post_norm(own) + self.experts_post_norm(mixed)

    def load(self, x: Array, stream: Array, counted: Array) -> Array:
        """Returns how the router shares out tokens, see `FEED_FORWARDS`."""
        return self.mixture.load(self._seen(stream), x, counted)

    def _seen(self, stream: Array) -> Array:
        """Returns what the router sees of the stream."""
        scale = self.router_scale.weight[...].astype(stream.dtype)
        seen = self.router_norm(stream) * scale
        return seen * jnp.asarray(self.hidden**-0.5, stream.dtype)
