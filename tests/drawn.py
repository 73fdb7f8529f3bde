"""Adapters drawn at random without a model, and what they mean in float64."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.names import flatten
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig

LINEARS: dict[str, tuple[int, ...]] = {
    "layers.attn.q_proj": (3, 12, 10),
    "lm_head": (10, 12),
}
"""Path -> shape of the update, layers first."""


def adapter(
    seed: int = 0,
    *,
    shapes: Mapping[str, tuple[int, ...]] = LINEARS,
    base: str = "one",
    **config: Any,
) -> Adapter:
    """Returns an adapter of linears of some shapes, with random factors."""
    settings = {"rank": 3, "alpha": 4.0, "targets": ",".join(shapes)} | config
    made = LoRAConfig(**settings)
    mark = json.dumps({"structure": base, "sample": {"norm": [1.0, 2.0]}})
    rng = np.random.default_rng(seed)
    entries = []
    for name, (*stack, rows, columns) in shapes.items():
        rank, _ = made.shape_of(name)
        for factor, shape in (("lora_a", (rows, rank)), ("lora_b", (rank, columns))):
            x = 0.3 * rng.standard_normal((*stack, *shape))
            # Layers without adapter hold what nothing may read.
            layers = made.layers if stack else ()
            variable = nnx.LoRAParam(jnp.asarray(x, jnp.float32))
            variable.set_metadata(base=mark, stack=len(stack), layers=layers)
            entries.append(((*name.split("."), factor), variable))
    return Adapter(nnx.from_flat_state(entries), made)


def updates(adapter: Adapter) -> dict[str, np.ndarray]:
    """Returns {name of a linear, layers numbered: its update, float64 (in, out)}."""
    flat = {k: np.asarray(x, np.float64) for k, x in flatten(adapter.lora).items()}
    found = {}
    for name in (k.removesuffix(".lora_a") for k in flat if k.endswith(".lora_a")):
        rank, alpha = adapter.config.shape_of(re.sub(r"\.\d+", "", name))
        scale = alpha / (math.sqrt(rank) if adapter.config.rslora else rank)
        found[name] = scale * flat[f"{name}.lora_a"] @ flat[f"{name}.lora_b"]
    return found


def weighted(
    adapters: list[Adapter], weights: list[float]
) -> dict[str, np.ndarray | float]:
    """Returns the weighted sum of updates; a linear that some lack is the others'."""
    total: dict[str, Any] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for name, update in updates(one).items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


def assert_near(
    have: Mapping[str, Any], want: Mapping[str, Any], tolerance: float
) -> None:
    """Compares updates by name, to within a part of the largest norm."""
    assert have.keys() == want.keys()
    size = max(np.linalg.norm(x) for x in want.values())
    for name, x in want.items():
        error = np.linalg.norm(have[name] - x)
        assert error <= tolerance * size, f"{name}: {error} of {size}"
