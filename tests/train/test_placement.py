"""Where weights, activations and optimizer state rest changes no number."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig, attach, join
from qlora_jax.models import Decoder
from qlora_jax.nn import quantize
from qlora_jax.train.step import make_train_step


def losses(
    model: Any, checkpoint: Any, stream: bool, memory_kind: str, **more: Any
) -> list[tuple[float, float]]:
    """Returns loss and gradient's norm of three steps."""
    graphdef, lora, base = qlora.split(model)
    lora = jax.tree.map(jnp.copy, lora)
    if stream:
        base = qlora.stream(base)
        there = {x.sharding.memory_kind for x in jax.tree.leaves(base["layers"])}
        assert there == {"pinned_host"}
    tx = qlora.offload(optax.adamw(1e-2), memory_kind)
    paged = memory_kind == "pinned_host"
    step = make_train_step(graphdef, tx, checkpoint=checkpoint, sums_on_host=paged)
    batch, state, found = batch_of(**more), tx.init(lora), []
    for i in range(3):
        key = jax.random.key(i) if more.get("dropout") else None
        lora, state, metrics = step(lora, base, state, batch, key)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert step._cache_size() == 1  # wherever things rest, a step compiles once
    return found


def batch_of(accumulated: int | None = None, **_: Any) -> dict[str, jax.Array]:
    ids = tiny.tokens(4, 32)
    weights = jnp.ones(ids.shape, jnp.float32).at[1, 20:].set(0)
    batch = {"tokens": ids, "weights": weights}
    if accumulated:
        batch = {k: x.reshape(accumulated, -1, 32) for k, x in batch.items()}
    return batch


@pytest.mark.slow
def test_streamed_paged_and_offloaded_runs_have_the_same_losses():
    """Layers of several kinds do so in test_segments.py."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=3)
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    model = attach(quantize(model), LoRAConfig(rank=4), key=jax.random.key(1))
    plain = losses(model, "layer", False, "device")
    assert plain[2] < plain[0]
    for checkpoint in ("attention", "layer", "host"):
        kind = "pinned_host" if checkpoint == "host" else "device"
        assert losses(model, checkpoint, True, kind) == plain, checkpoint


@pytest.mark.slow
def test_a_streamed_bfloat16_run_rounds_where_a_plain_one_does():
    """XLA keeps more than bfloat16 within a fusion: none may reach across two layers."""
    model = Decoder(tiny.CONFIG, key=jax.random.key(0), dtype="bfloat16")
    model = attach(quantize(model), LoRAConfig(rank=4), key=jax.random.key(1))
    plain = losses(model, "layer", False, "device")
    assert losses(model, "layer", True, "device") == plain


@pytest.mark.slow
def test_micro_batches_that_share_a_copy_or_add_up_on_the_host():
    model = tiny.adapted(tiny.quantized(), dropout=0.2)
    more = {"accumulated": 4, "dropout": True}
    plain = losses(model, "host", False, "device", **more)
    assert losses(model, "host", False, "pinned_host", **more) == plain
    streamed = losses(model, "host", True, "device", **more)
    # Loops of another order: XLA contracts products and sums otherwise in places.
    np.testing.assert_allclose(streamed, plain, rtol=2e-6)


def test_a_step_copies_each_layer_twice_however_many_micro_batches():
    graphdef, lora, base = qlora.split(tiny.adapted(tiny.quantized()))
    base = qlora.stream(base)
    tx = optax.sgd(1e-2)
    step = make_train_step(graphdef, tx, checkpoint="layer")

    def copies(batch: dict[str, jax.Array]) -> int:
        traced = jax.make_jaxpr(step)(lora, base, tx.init(lora), batch)
        return arrivals(traced.jaxpr)

    layers = tiny.CONFIG.num_layers
    arrays = len(jax.tree.leaves(base["layers"]))
    assert copies(batch_of()) == 2 * layers * arrays
    assert copies(batch_of(accumulated=4)) == 2 * layers * arrays


def arrivals(jaxpr: Any) -> int:
    """Counts copies from host to device as often as a program's loops run them."""
    count = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += times * arrivals(inner)
        if equation.primitive.name == "device_put":
            spaces = (v.aval.memory_space for v in equation.invars)
            count += sum(s == jax.memory.Space.Host for s in spaces)
    return count


@pytest.mark.slow
def test_experts_stream_too():
    config = dataclasses.replace(tiny.CONFIG, num_experts=4, qk_norm="head")
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    model = attach(quantize(model), LoRAConfig(rank=4), key=jax.random.key(1))
    plain = losses(model, "layer", False, "device")
    assert losses(model, "host", True, "pinned_host") == plain


def test_a_streamed_base_generates_and_evaluates():
    model = tiny.adapted(tiny.quantized())
    graphdef, lora, base = qlora.split(model)
    streamed = join(graphdef, lora, qlora.stream(base))
    prompts = [[1, 2, 3], [4, 5]]
    config = qlora.SampleConfig(max_new_tokens=5)
    assert qlora.generate(streamed, prompts, config) == qlora.generate(
        model, prompts, config
    )
