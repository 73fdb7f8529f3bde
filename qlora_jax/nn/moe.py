"""Mixture of experts: each token through the experts that its router chose (grouped.py)."""

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.grouped import combine, dispatch, group, over_blocks
from qlora_jax.nn.lora import project
from qlora_jax.nn.matmul import frozen_matmul
from qlora_jax.nn.variables import FrozenParam
from qlora_jax.nn.vector import Vector

Score = Literal["softmax", "sigmoid"]

_LEAST_SUM = 1e-20
"""A sum of weights is taken for at least so much before they are divided by it."""

SHARED_KEY = 2**31 - 1
"""Folded into a layer's key for the shared feed-forward; blocks of experts count from 0."""


class Router(Weighted):
    """Chooses experts by a frozen linear's outputs, and gives each its weight.

    Attributes:
      weight: FrozenParam, (..., experts, hidden); neither quantized nor adapted.
      bias: FrozenParam, (..., experts), or None.
      correction: Vector of what is added to each expert's weight for choosing alone, or None
        (arXiv 2408.15664).
      expert_scales: Vector of what the weight of each expert is multiplied by at last, or None.
      settings: The other arguments of __init__.
    """

    AXES: ClassVar = {"weight": ("experts", "hidden"), "bias": ("experts",)}

    def __init__(
        self,
        weight: Array,
        bias: Array | None = None,
        *,
        correction: Vector | None = None,
        expert_scales: Vector | None = None,
        top_k: int,
        normalize: bool,
        score: Score = "softmax",
        groups: tuple[int, int, int] = (1, 1, 2),
        scale: float = 1.0,
        sum_offset: float = 0.0,
    ):
        """Makes a router.

        Args:
          weight, bias, correction, expert_scales: See the attributes.
          top_k: Experts a token.
          normalize: Whether the chosen weights are scaled to sum to 1.
          score: What makes weights of outputs: a softmax over them, or a sigmoid each.
          groups: (the number of groups that the experts are in, the number of those that a
            token's experts come from, how many of a group's best experts rank it by their
            sum).
          scale: The factor of the weights at last.
          sum_offset: Added to their sum before they are divided by it.
        """
        self.weight = FrozenParam(weight)
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))
        self.correction = nnx.data(correction)
        self.expert_scales = nnx.data(expert_scales)
        self.top_k, self.normalize = top_k, normalize
        self.score: Score = score
        self.groups, self.scale, self.sum_offset = groups, scale, sum_offset

    @property
    def can_train(self) -> bool:
        """Routers never train."""
        return False

    def holding(self, weight: Any, bias: Any = None) -> "Router":
        """Returns the router of another weight and bias."""
        return Router(
            weight,
            bias,
            correction=self.correction,
            expert_scales=self.expert_scales,
            top_k=self.top_k,
            normalize=self.normalize,
            score=self.score,
            groups=self.groups,
            scale=self.scale,
            sum_offset=self.sum_offset,
        )

    def __call__(
        self, x: Float[Array, "tokens hidden"]
    ) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        """Returns float32 weights and the experts' indices."""
        logits = self._logits(x)
        if self.score == "softmax":
            scores = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
        weights, chosen = self._chosen(scores)
        if self.normalize:
            total = jnp.sum(weights, axis=-1, keepdims=True) + self.sum_offset
            weights = weights / jnp.maximum(total, _LEAST_SUM)
        if self.expert_scales is not None:
            weights = (
                weights * self.expert_scales.weight[...].astype(jnp.float32)[chosen]
            )
        return weights * self.scale, chosen

    def load(
        self, x: Float[Array, "tokens hidden"], counted: Float[Array, " tokens"]
    ) -> Float[Array, "2 experts"]:
        """Returns how tokens are shared out, see `load_balance_loss`: for each expert the
        number of tokens that chose it, and the sum of its parts of their softmax.

        As in transformers, the choice is that of the softmax alone, without correction and
        groups, and a softmax where scores are sigmoids too.

        Args:
          x: Tokens.
          counted: 1 for a token that counts, 0 for padding.
        """
        shares = jax.nn.softmax(self._logits(x), axis=-1)
        chosen = lax.top_k(lax.stop_gradient(shares), self.top_k)[1]
        counted = counted.astype(jnp.float32)
        taken = jnp.zeros(shares.shape[-1], jnp.float32)
        taken = taken.at[chosen].add(counted[:, None])
        return jnp.stack([taken, counted @ shares])

    def _logits(self, x: Array) -> Array:
        logits = frozen_matmul(x, self.weight[...]).astype(jnp.float32)
        if self.bias is None:
            return logits
        return logits + self.bias[...].astype(jnp.float32)

    def _chosen(self, scores: Array) -> tuple[Array, Array]:
        by = lax.stop_gradient(scores)
        if self.correction is not None:
            by = by + self.correction.weight[...].astype(jnp.float32)
        count, taken, summed = self.groups
        if taken < count:
            each = by.reshape(*by.shape[:-1], count, -1)
            best = jnp.sum(lax.top_k(each, summed)[0], axis=-1)
            inside = jax.nn.one_hot(lax.top_k(best, taken)[1], count).sum(axis=-2)
            by = jnp.where(inside[..., None] > 0, each, -jnp.inf).reshape(by.shape)
        chosen = lax.top_k(by, self.top_k)[1]
        return jnp.take_along_axis(scores, chosen, axis=-1), chosen


class Shared(nnx.Module):
    """A feed-forward that all tokens take beside their experts.

    Attributes:
      mlp: The feed-forward.
      gate: A linear to one number, whose sigmoid its output is multiplied by, or None.
    """

    def __init__(self, mlp: Any, gate: Any = None):
        self.mlp = mlp
        self.gate = nnx.data(gate)

    def __call__(self, x: Float[Array, "tokens hidden"], key: Array | None) -> Array:
        """Applies the feed-forward, and its gate."""
        key = None if key is None else jax.random.fold_in(key, SHARED_KEY)
        y = self.mlp(x, key)
        if self.gate is None:
            return y
        share = project(self.gate, x, key, 0).astype(jnp.float32)
        return (y * jax.nn.sigmoid(share)).astype(y.dtype)


class Experts(nnx.Module):
    """A router and feed-forwards of which each token takes some.

    Attributes:
      router: Router.
      experts: One feed-forward module, every array with a leading axis of experts.
      count: The number of experts.
      shared: Shared, or None.
    """

    def __init__(
        self, router: Router, experts: Any, count: int, shared: Shared | None = None
    ):
        self.router = router
        self.experts = experts
        self.count = count
        self.shared = nnx.data(shared)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        top = self.router.top_k
        kept = {name: top * size for name, size in self.experts.kept.items()}
        if self.shared is not None:
            for name, size in self.shared.mlp.kept.items():
                kept[name] = kept.get(name, 0) + size
        return kept

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        key: Array | None = None,
        seen: Float[Array, "batch seq hidden"] | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """Sums the chosen experts' outputs, weighted; `seen` is what the router sees, if that
        is not x."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(
            flat if seen is None else seen.reshape(flat.shape)
        )
        groups = group(chosen, self.count)

        def of_a_block(mlp: Any, index: Array, rows: Array) -> Array:
            return mlp(rows, None if key is None else jax.random.fold_in(key, index))

        apply = over_blocks(self.experts, groups, of_a_block)
        y = combine(apply(dispatch(flat, groups)), weights, groups)
        if self.shared is not None:
            y = y + self.shared(flat, key)
        return y.reshape(x.shape)

    def load(self, x: Array, stream: Array, counted: Array) -> Array:
        """Returns how the router shares out tokens, see `FEED_FORWARDS`."""
        del stream
        return self.router.load(x.reshape(-1, x.shape[-1]), counted.reshape(-1))


def load_balance_loss(
    load: Float[Array, "*batch 2 experts"], tokens: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Returns the load-balance loss of Switch Transformers (arXiv 2101.03961, equations 4 to
    6), of all layers together: experts * sum of (part of tokens that chose an expert) *
    (its mean part of their softmax), over the experts. It is top_k where all are chosen alike.

    Args:
      load: What `Router.load` returns, mean of the layers.
      tokens: The number of tokens that were counted; 0 gives 0.
    """
    parts = load / jnp.maximum(tokens, 1.0)[..., None, None]
    return load.shape[-1] * jnp.sum(parts[..., 0, :] * parts[..., 1, :], axis=-1)
