"""A router and gated feed-forwards of which each token takes some."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.feed_forward.mlp import MLP
from qlora_jax.models.spec import ExpertsSpec, MLPSpec
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.moe import Experts, Router, Shared
from qlora_jax.nn.vector import RowVector, Vector


def experts(
    spec: ExpertsSpec,
    config: DecoderConfig,
    linear: Callable[..., Linear],
    normal: Callable[..., Array],
) -> Experts:
    """Makes the mixture that a config describes, see `FEED_FORWARDS`."""
    count, hidden = config.num_experts, config.hidden_size
    correction = None
    if spec.correction:
        row = spec.correction == 2
        correction = RowVector(normal(1, count)) if row else Vector(normal(count))
    router = Router(
        normal(count, hidden),
        normal(count) if spec.router_bias else None,
        correction=correction,
        expert_scales=Vector(jnp.ones_like(normal(count)))
        if spec.expert_scales
        else None,
        top_k=config.experts_per_token,
        normalize=config.normalize_experts,
        score=spec.score,
        groups=(spec.groups, spec.top_groups, spec.best_of_group),
        scale=spec.scale,
        sum_offset=spec.sum_offset,
    )
    mlp = MLP(MLPSpec(), config, functools.partial(linear, stack=(count,)))
    shared = None
    if spec.shared_size:
        own = MLP(MLPSpec(intermediate_size=spec.shared_size), config, linear)
        shared = Shared(own, linear(1, hidden, False) if spec.shared_gate else None)
    return Experts(router, mlp, count, shared)
