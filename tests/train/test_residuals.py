"""Contract C3: of a 4-bit weight, backward keeps the codes and nothing dense."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import join, split
from qlora_jax.nn import Linear, QuantizedEmbedding, QuantizedLinear
from qlora_jax.nn.packing import quantize_rows
from qlora_jax.objectives import SFT

SEQ = 7
"""An odd one: no activation then has the size of a weight by chance."""


def weight_sizes(model: nnx.Module) -> dict[int, str]:
    """Returns the sizes of every frozen kernel and the embedding, alone and stacked."""
    sizes = {model.embed_tokens.weight[...].size: "embed_tokens"}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, (Linear, QuantizedLinear)):
            one = node.in_features * node.out_features
            name = ".".join(map(str, path))
            sizes |= {one: name, one * math.prod(node.stack): f"the stack {name}"}
    return sizes


def residuals(model: nnx.Module, checkpoint: str, dropout: bool) -> list[Any]:
    """Returns the shapes and dtypes of all that the loss keeps for its backward."""
    graphdef, lora, base = split(model)
    tokens = tiny.tokens(2, SEQ)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape)}
    key = jax.random.key(0) if dropout else None

    def kept(lora, base):
        def loss(lora):
            return SFT(join(graphdef, lora, base), batch, key, checkpoint)[0]

        return jax.vjp(loss, lora)[1]

    # The function that jax.vjp returns is a pytree of its residuals.
    return jax.tree.leaves(jax.eval_shape(kept, lora, base))


def dense_residuals(
    model: nnx.Module, checkpoint: str, dropout: bool = False
) -> list[str]:
    """Returns the float residuals that have the size of a frozen weight."""
    kept = residuals(model, checkpoint, dropout)
    sizes = weight_sizes(model)
    # The stream between layers is there, so the walk does see what is kept.
    assert any(x.size == 2 * 2 * SEQ * 64 for x in kept)
    return [
        f"{x.dtype}{x.shape} is as large as {sizes[x.size]}"
        for x in kept
        if jnp.issubdtype(x.dtype, jnp.floating) and x.size in sizes
    ]


@pytest.mark.parametrize(
    ("dtype", "checkpoint"),
    [("float32", "none"), ("float32", "layer"), ("bfloat16", "none")],
)
def test_nothing_of_a_frozen_weights_size_is_kept_for_backward(dtype, checkpoint):
    model = tiny.adapted(tiny.quantized(dtype))
    assert dense_residuals(model, checkpoint) == []


def test_nor_with_dropout():
    model = tiny.adapted(tiny.quantized(), dropout=0.1)
    assert dense_residuals(model, "none", dropout=True) == []


def test_nor_of_int8_tables():
    dense = tiny.quantized()
    rows, head = (
        quantize_rows(w[...]) for w in (dense.embed_tokens.weight, dense.lm_head.kernel)
    )

    def replace(path: tuple, node: Any) -> Any:
        if path == ("embed_tokens",):
            return QuantizedEmbedding(rows)
        return QuantizedLinear(head) if path == ("lm_head",) else node

    vocab = math.prod(rows.shape)
    for targets in ("q_proj", "q_proj,embed_tokens,lm_head"):
        model = tiny.adapted(nnx.recursive_map(replace, dense), targets=targets)
        kept = residuals(model, "none", False)
        assert {x.dtype.name for x in kept if x.size == vocab} <= {"int8"}
    kept = jax.tree.leaves(jax.vjp(model.head, jnp.ones((3, 64)))[1])
    assert any(x.dtype == jnp.int8 for x in kept)
    assert all(x.size < vocab for x in kept if x.dtype != jnp.int8)


def test_the_codes_are_what_is_kept():
    kept = residuals(tiny.adapted(tiny.quantized()), "none", False)
    assert sum(x.dtype == jnp.uint16 for x in kept) == 7
    assert all(x.dtype in ("float32", "uint16", "uint8", "int32") for x in kept)


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": "both", "qk_norm": "head"},
        {"norms": "parallel", "norm_kind": "layer", "fused_gate_up": True},
        {"qk_norm": "rotated", "query_growth": (0.1, 4), "rope_interleaved": True},
        {"gated": False, "norm_kind": "bare", "embedding_norm": True},
    ],
)
def test_a_layer_keeps_the_features_that_the_plan_counts(changes):
    config = dataclasses.replace(tiny.CONFIG, num_layers=3, **changes)
    model = tiny.adapted(tiny.drawn(config))
    (stack,) = model.stacks
    kept = [x.shape for x in residuals(model, "none", False)]
    # Of layers, rows, tokens: what a layer is given, and all under its checkpoint names.
    features = sum(math.prod(s[3:]) for s in kept if s[:3] == (3, 2, SEQ))
    assert features == config.hidden_size + sum(stack.kept.values())


def test_the_walk_finds_weights_that_are_kept():
    # A dense base is its own residual: what the tests above would find, were it there.
    assert len(dense_residuals(tiny.adapted(tiny.decoder()), "none")) == 7
