"""Where weights, activations and optimizer state rest changes no number."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig, attach, join
from qlora_jax.models import Decoder
from qlora_jax.models.decoder import LayerKind
from qlora_jax.nn import quantize
from qlora_jax.train.step import make_train_step

WINDOWS = tuple(LayerKind(window=w) for w in (3, None, 3, None, 3))


def losses(model: Any, checkpoint: Any, stream: bool, memory_kind: str) -> list[float]:
    graphdef, lora, base = qlora.split(model)
    lora = jax.tree.map(jnp.copy, lora)
    if stream:
        base = qlora.stream(base)
        there = {x.sharding.memory_kind for x in jax.tree.leaves(base["layers"])}
        assert there == {"pinned_host"}
    tx = qlora.offload(optax.adamw(1e-2), memory_kind)
    step = make_train_step(graphdef, tx, checkpoint=checkpoint)
    ids = tiny.tokens(4, 32)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape, jnp.float32)}
    state, found = tx.init(lora), []
    for _ in range(3):
        lora, state, metrics = step(lora, base, state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("kinds", [(), WINDOWS], ids=["alike", "in turns"])
def test_streamed_paged_and_offloaded_runs_have_the_same_losses(kinds):
    config = dataclasses.replace(tiny.CONFIG, num_layers=5, layer_kinds=kinds)
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    model = attach(quantize(model), LoRAConfig(rank=4), key=jax.random.key(1))
    plain = losses(model, "layer", False, "device")
    assert plain[2] < plain[0]
    for checkpoint, stream, kind in (
        ("none", False, "device"),
        ("attention", False, "device"),
        ("host", False, "device"),
        ("none", True, "device"),
        ("layer", True, "pinned_host"),
        ("host", True, "pinned_host"),
    ):
        assert losses(model, checkpoint, stream, kind) == plain, (checkpoint, stream)


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
