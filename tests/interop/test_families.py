"""Every family of dense models, live: 4-bit folder and adapter open in PyTorch."""

import numpy as np
import pytest
import tiny
from models import family_cases

import qlora_jax as qlora
from qlora_jax.models import FAMILIES

pytestmark = pytest.mark.interop

ORDER = 1e-4
"""Absolute, of logits of size 10 to 30: float32 sums in another order."""
CASES = {
    family: next(c for c in family_cases.CASES.values() if c["model_type"] == family)
    for family in sorted(FAMILIES)
    if family not in ("mixtral", "qwen3_moe")  # in test_experts.py
}
# bitsandbytes on CPUs decodes rows wrongly that are no multiple of a block.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


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
    for ours, more in ((model, {}), (adapted, {"adapter": adapter})):
        side("logits", **job, **more)
        theirs = np.load(tmp_path / "t.npz")["logits"]
        np.testing.assert_allclose(tiny.logits(ours, ids), theirs, atol=ORDER, rtol=0)
