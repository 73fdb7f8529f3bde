"""Tensors that hold all experts of a layer: cut, and put together again."""

import numpy as np
import pytest

from qlora_jax.models.fused import Fused, Joining, cuts

LAYER = "model.layers.{}.mlp.experts"
GATE, UP, DOWN = (f"{LAYER}.{{}}.{name}.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_are_cut_by_hand_and_joined_to_the_same(transposed, interleaved):
    one = Fused(f"{LAYER}.gate_up", (GATE, UP), transposed, interleaved)
    rows = np.arange(3 * 6 * 5).reshape(3, 6, 5)  # experts, rows of both, columns
    whole = rows.swapaxes(1, 2) if transposed else rows
    gate, up = (
        (rows[:, 0::2], rows[:, 1::2]) if interleaved else (rows[:, :3], rows[:, 3:])
    )
    found = list(cuts([one], {one.name.format(4): whole.shape, "other": (3,)}, 3))
    (name, which, places), shape = found[0], one.part_shape(whole.shape)
    assert (len(found), name, which, shape) == (1, one.name.format(4), one, (3, 5))
    joining, made = Joining([one], 3), []
    for expert in range(3):
        for template, exact in ((GATE, gate), (UP, up)):
            part = template.format(4, expert)
            cut = one.cut(whole, places[part])
            np.testing.assert_array_equal(cut, exact[expert])
            made += joining.add(part, cut)
    assert [name for name, _ in made] == [one.name.format(4)]
    np.testing.assert_array_equal(made[0][1], whole)
    assert joining.incomplete() == []


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 5, 5), (3,), (3, 0, 5), ()])
def test_what_does_not_hold_all_experts_has_no_parts(shape):
    one = Fused(f"{LAYER}.gate_up", (GATE, UP))
    assert [places for *_, places in cuts([one], {one.name.format(0): shape}, 3)] == [
        {}
    ]


def test_parts_of_one_whole_come_together_and_what_is_missing_is_named():
    fused = (Fused(f"{LAYER}.gate_up", (GATE, UP)), Fused(f"{LAYER}.down", (DOWN,)))
    joining = Joining(fused, 2)
    names = [t.format(0, e) for t in (DOWN, GATE, "a.{}.{}", UP) for e in range(2)]
    ordered = joining.ordered(names, str)
    assert sorted(ordered) == sorted(names)
    assert ordered[:2] == names[:2] and ordered[2:6] == names[2:4] + names[6:]
    assert [*joining.add("a.0.0", np.ones(2))][0][0] == "a.0.0"
    assert not [*joining.add(GATE.format(0, 1), np.ones((2, 3)))]
    assert joining.incomplete() == [
        f"{LAYER.format(0)}.gate_up was not written: 1 of its parts are there, and others "
        "are not"
    ]
