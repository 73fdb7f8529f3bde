"""Every family of dense models, live: 4-bit folder and adapter open in PyTorch, and a step's
loss and gradients are those of PEFT."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import family_cases
from safetensors.numpy import load_file

import qlora_jax as qlora
from qlora_jax.models import FAMILIES

pytestmark = [pytest.mark.interop, pytest.mark.rotates]

ORDER = 1e-4
"""Absolute, of logits of size 10 to 30: float32 sums in another order."""
CASES = {
    family: next(c for c in family_cases.CASES.values() if c["model_type"] == family)
    for family in sorted(FAMILIES)
    if not hasattr(FAMILIES[family], "PARAMETERS")  # mixtures are in test_experts.py
    and not hasattr(FAMILIES[family], "FUSED")
}
# Of these the experts are in test_experts.py, and here what has none.
CASES |= {"granitemoehybrid": family_cases.CASES["granitemoehybrid_dense"]}
CASES["gemma4_text"] = family_cases.CASES["gemma4_text"]
CASES["gemma4_text_told"] = {
    **family_cases.CASES["gemma4_text_told"],
    "hidden_size_per_layer_input": 64,
}
# bitsandbytes on CPUs decodes rows wrongly that are no multiple of a block.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SIZES |= {"linear_value_head_dim": 16, "global_head_dim": 32}
SIZES |= {"shared_intermediate_size": 128}
GRADIENTS = 2e-4
"""The error allowed, relative to the largest of a tensor's gradient: both sides compute in
float32 and add in another order."""


@pytest.mark.parametrize("family", CASES)
def test_a_4_bit_folder_and_its_adapter_open_in_pytorch(side, tmp_path, family):
    base, folder = tmp_path / "base", tmp_path / "ours"
    side("make", config=CASES[family] | SIZES, out=base)
    model, _ = qlora.load(base, qlora.QuantConfig(), "float32")
    qlora.save_model(model, folder, source=base)
    adapted = tiny.adapted(model, rank=4, alpha=6.0)
    adapter = qlora.export_peft(tmp_path / "adapter", adapted)
    np.save(tmp_path / "ids.npy", family_cases.tokens("llama", 24))
    ids = np.load(tmp_path / "ids.npy")
    job = {"base": folder, "ids": tmp_path / "ids.npy", "out": tmp_path / "t.npz"}
    for ours, more in ((model, {}), (adapted, {"adapter": adapter, "grads": True})):
        side("logits", **job, **more)
        theirs = dict(np.load(tmp_path / "t.npz"))
        np.testing.assert_allclose(
            tiny.logits(ours, ids), theirs["logits"], atol=ORDER, rtol=0
        )
    graphdef, lora, rest = qlora.split(adapted)
    loss, grads = tiny.adapter_step(graphdef, lora, rest, jnp.asarray(ids))
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5)
    # Written as if they were an adapter, gradients have PEFT's names.
    out = qlora.export_peft(tmp_path / "grads", qlora.join(graphdef, grads, rest))
    written = load_file(out / "adapter_model.safetensors")
    assert {f"grad:{name}" for name in written} == {n for n in theirs if ":" in n}
    for name, got in written.items():
        want = theirs[f"grad:{name}"]
        atol = GRADIENTS * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=name)
