"""Contract C3: of a 4-bit weight, backward keeps the codes and nothing dense."""

import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import join, split
from qlora_jax.nn import Linear, QuantizedLinear
from qlora_jax.train.step import next_token_loss

SEQ = 7
"""An odd one: no activation then has the size of a weight by chance."""


def weight_sizes(model: nnx.Module) -> dict[int, str]:
    """Returns the sizes of every frozen kernel and the embedding, alone and stacked."""
    sizes = {model.embed_tokens[...].size: "embed_tokens"}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, (Linear, QuantizedLinear)):
            one = node.in_features * node.out_features
            name = ".".join(map(str, path))
            sizes |= {one: name, one * math.prod(node.stack): f"the stack {name}"}
    return sizes


def dense_residuals(model: nnx.Module, checkpoint: str, dropout: bool = False) -> list[str]:
    """Returns the float residuals of the loss that have the size of a frozen weight."""
    graphdef, lora, base = split(model)
    tokens = tiny.tokens(2, SEQ)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape)}
    loss_fn = next_token_loss(checkpoint)
    key = jax.random.key(0) if dropout else None
    # jitted, as in the step: what the scan keeps are its stacked outputs either way.
    forward = jax.jit(lambda lora: loss_fn(join(graphdef, lora, base), batch, key))
    _, backward = jax.vjp(forward, lora)
    residuals = jax.tree.leaves(backward)
    sizes = weight_sizes(model)
    assert len(residuals) > 10
    # The adapter and activations are there, so the walk does see what is kept.
    assert any(x.size == 2 * SEQ * 64 * 2 for x in residuals)
    return [
        f"{x.dtype}{x.shape} is as large as {sizes[x.size]}"
        for x in residuals
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


def test_the_codes_are_kept():
    graphdef, lora, base = split(tiny.adapted(tiny.quantized()))
    tokens = tiny.tokens(2, SEQ)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape)}
    loss_fn = next_token_loss("none")
    _, backward = jax.vjp(lambda x: loss_fn(join(graphdef, x, base), batch, None), lora)
    assert any(x.dtype == jnp.uint16 for x in jax.tree.leaves(backward))


def test_the_walk_finds_a_weight_that_is_kept():
    # A dense base is its own residual: what the tests above would find, were it there.
    found = dense_residuals(tiny.adapted(tiny.decoder()), "none")
    assert any("layers.mlp.down_proj" in text for text in found)


