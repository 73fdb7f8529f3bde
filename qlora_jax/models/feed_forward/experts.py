"""A router and gated feed-forwards of which each token takes some."""

import functools
from collections.abc import Callable

from jaxtyping import Array

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.feed_forward.mlp import MLP
from qlora_jax.models.spec import ExpertsSpec, MLPSpec
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.moe import Experts, Router


def experts(
    spec: ExpertsSpec,
    config: DecoderConfig,
    linear: Callable[..., Linear],
    normal: Callable[..., Array],
) -> Experts:
    """Makes the mixture that a config describes, see `FEED_FORWARDS`."""
    del spec
    count = config.num_experts
    router = Router(
        normal(count, config.hidden_size),
        config.experts_per_token,
        config.normalize_experts,
    )
    mlp = MLP(MLPSpec(), config, functools.partial(linear, stack=(count,)))
    return Experts(router, mlp, count)
