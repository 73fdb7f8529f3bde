"""Adapters of whole parameters, taken apart and put together without PEFT."""

from typing import Any

import numpy as np
import pytest

from qlora_jax.exchange.peft.parameters import PREFIX, apart, whole
from qlora_jax.models import FAMILIES, whole_parameters

EXPERTS, RANK, HIDDEN, WIDE = 3, 2, 4, 5
SETTINGS: dict[str, Any] = {"r": RANK, "lora_alpha": 8.0}


def factors(family: str, *parts: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns factors of the experts of layer 1: of gate (0), up (1) and down (2)."""
    rng, made = np.random.default_rng(0), {}
    gate_up, down = whole_parameters(FAMILIES[family])
    names = [(*gate_up.parts, *down.parts)[part] for part in parts]
    for name, part in zip(names, parts, strict=True):
        ins, outs = (WIDE, HIDDEN) if part == 2 else (HIDDEN, WIDE)
        for expert in range(EXPERTS):
            module = name.format(1, expert).removesuffix(".weight")
            shapes = (ins, RANK), (RANK, outs)
            made[module] = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)
    return made


@pytest.mark.parametrize("parts", [(0, 1, 2), (2,), (1,), (0, 2)])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_what_is_put_together_means_the_same_taken_apart(family, parts):
    fused, given = whole_parameters(FAMILIES[family]), factors(family, *parts)
    made = whole(given, fused, EXPERTS)
    ranks = {one.partition("{}.")[2]: n * RANK for one, n in made.parts.items()}
    settings = SETTINGS | {"target_parameters": made.parameters, "rank_pattern": ranks}
    back = apart(settings, made.tensors, fused, EXPERTS)
    assert not back.problems and "target_parameters" not in back.settings
    assert back.modules >= given.keys()
    for module in back.modules:
        a, b = (
            back.tensors[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB"
        )
        left, right = given.get(
            module, (np.zeros((a.shape[1], 1)), np.zeros((1, len(b))))
        )
        np.testing.assert_allclose(b @ a, (left @ right).T, atol=1e-6)


def test_what_cannot_be_read_is_named():
    fused = whole_parameters(FAMILIES["gpt_oss"])
    tensors = whole(factors("gpt_oss", 2), fused, EXPERTS).tensors
    module = f"{PREFIX}model.layers.1.mlp.experts"

    def problems(tensors: dict[str, np.ndarray], *targets: str) -> str:
        settings = SETTINGS | {"target_parameters": [*targets]}
        return "; ".join(apart(settings, tensors, fused, EXPERTS).problems)

    assert not problems(tensors, "experts.down_proj")
    assert "names other, of which there are no" in problems(tensors, "other")
    deeper = {f"{module}.base_layer.lora_A.weight": tensors[f"{module}.lora_A.weight"]}
    assert "names no parameter for it" in problems(deeper, "experts.down_proj")
    short = {f"{module}.lora_A.weight": np.zeros((4, WIDE))}
    said = problems(short, "experts.down_proj")
    assert "has shape (4, 5), expected rank 2 of each of 3 experts in axis 0" in said
