"""PEFT's own adapters on the golden Llama: the same logits, loss and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.adapters import join, merge, split
from qlora_jax.adapters.names import flatten
from qlora_jax.exchange.peft import import_peft
from qlora_jax.objectives import SFT
from qlora_jax.sources.load import load

LOGITS = 1e-4
"""Absolute; the order of float32 sums, as the golden README asks."""
GRADIENTS = 1e-4
"""Relative to the largest of a factor."""


def ours(name: str) -> str:
    """Turns PEFT's name of a factor into ours."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    name = name.replace(".self_attn.", ".attn.").removesuffix(".weight")
    return name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")


@pytest.fixture
def case(
    golden: Callable[[str], Path],
) -> Callable[[str, str], tuple[Any, Callable[[str], Any], jax.Array]]:
    """Opens a base with an adapter: (model, reader of the case's arrays, token ids)."""

    def open_case(base: str, adapter: str):
        folder = f"models/adapters/{adapter}"
        golden(f"{folder}/adapter_model.safetensors")  # skips before the base is loaded
        model, _ = load(golden(f"models/{base}"), dtype="float32")
        ids = np.load(golden("models/input_ids.npy")).astype(np.int32)
        return (
            import_peft(golden(folder), model),
            lambda name: np.load(golden(f"{folder}/{name}")),
            jnp.asarray(ids),
        )

    return open_case


@pytest.mark.parametrize(
    "name", ["lora_all_r8_on_fp32", "lora_qv_r4_on_fp32", "rslora_r8_on_fp32"]
)
def test_logits_unmerged_and_merged_are_those_of_peft(case, name):
    model, read, ids = case("llama_fp32", name)
    said = tiny.logits(model, ids)
    np.testing.assert_allclose(said, read("logits.npy"), atol=LOGITS, rtol=0)
    said = tiny.logits(merge(model, dtype="float32"), ids)
    np.testing.assert_allclose(said, read("logits_merged.npy"), atol=LOGITS, rtol=0)


def test_logits_on_nf4_are_those_of_peft(case):
    model, read, ids = case("llama_bnb_nf4_dq_float32", "lora_all_r8_on_nf4")
    wanted = read("logits.npy")
    np.testing.assert_allclose(tiny.logits(model, ids), wanted, atol=LOGITS, rtol=0)


def test_loss_and_gradients_on_nf4_are_those_of_peft(case):
    model, read, ids = case("llama_bnb_nf4_dq_float32", "lora_all_r8_on_nf4")
    graphdef, lora, base = split(model)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape, jnp.float32)}
    predicted = ids.shape[0] * (ids.shape[1] - 1)

    def mean_loss(lora):
        return SFT(join(graphdef, lora, base), batch)[0] / predicted

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(lora)
    stored = read("loss_and_grads.npz")
    assert float(loss) == pytest.approx(float(stored["loss"]), abs=1e-5)
    flat = flatten(grads)
    names = [name for name in stored.files if name != "loss"]
    assert {ours(name) for name in names} == set(flat)
    for name in names:
        have, want = np.asarray(flat[ours(name)]).T, stored[name]
        atol = GRADIENTS * np.abs(want).max()
        np.testing.assert_allclose(have, want, atol=atol, rtol=0, err_msg=name)
