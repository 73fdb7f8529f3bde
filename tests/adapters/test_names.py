"""Dotted names of an adapter: there and back, and every mismatch in one message."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.adapters import split
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.errors import AdapterMismatchError


@pytest.fixture(scope="module")
def lora():
    return split(tiny.adapted(tiny.decoder(), targets="q_proj,lm_head"))[1]


def test_flatten_names_every_layer_by_itself(lora):
    flat = flatten(lora)
    assert set(flat) == {
        f"{place}.lora_{factor}"
        for place in ("layers.0.attn.q_proj", "layers.1.attn.q_proj", "lm_head")
        for factor in "ab"
    }
    assert flat["layers.1.attn.q_proj.lora_a"].shape == (64, 4)
    assert flat["lm_head.lora_b"].shape == (4, 272)


def test_unflatten_undoes_flatten(lora):
    back = unflatten(flatten(lora), lora)
    for one, other in zip(tiny.arrays(back), tiny.arrays(lora), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unflatten_takes_numpy_arrays_and_keeps_the_models_dtype(lora):
    flat = {name: np.asarray(x, np.float64) for name, x in flatten(lora).items()}
    back = unflatten(flat, lora)
    assert {x.dtype for x in tiny.arrays(back)} == {np.dtype(np.float32)}


def test_unflatten_names_every_mismatch_at_once(lora):
    flat = flatten(lora)
    del flat["layers.0.attn.q_proj.lora_b"]
    flat["layers.1.attn.q_proj.lora_a"] = jnp.zeros((64, 8))
    flat["layers.1.attn.q_prj.lora_a"] = jnp.zeros((64, 4))
    with pytest.raises(AdapterMismatchError) as caught:
        unflatten(flat, lora, "adapter 'runs/a'")
    message = str(caught.value)
    assert "adapter 'runs/a' does not fit this model (3 problems)" in message
    assert "layers.0.attn.q_proj.lora_b: missing" in message
    assert (
        "layers.1.attn.q_proj.lora_a: shape (64, 8), the model has (64, 4)" in message
    )
    assert "layers.1.attn.q_prj.lora_a: no such adapter parameter" in message
    assert "(nearest: layers.1.attn.q_proj.lora_a)" in message


def test_unflatten_names_at_most_twenty_mismatches(lora):
    flat = flatten(lora) | {f"other.{i}": jnp.zeros(1) for i in range(25)}
    with pytest.raises(AdapterMismatchError, match=r"25 problems[\s\S]*and 5 more$"):
        unflatten(flat, lora)
