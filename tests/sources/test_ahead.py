"""Tensors read ahead: in order, so much and no more, and errors where they belong."""

import threading

import numpy as np
import pytest

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.ahead import Ahead

NAMES = [f"w{i}" for i in range(6)]
SIZE = 4 * 10
SIZES = dict.fromkeys(NAMES, SIZE)


class Tensors(dict):
    """Tensors whose reading is written down; w3 is damaged."""

    def __init__(self):
        super().__init__({n: np.full(10, i, "f4") for i, n in enumerate(NAMES)})
        self.read: list[tuple[str, int]] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.append((name, threading.get_ident()))
        if name == "w3":
            raise CheckpointError("w3 is damaged")
        return super().__getitem__(name)


def opened(limit: int) -> tuple[Tensors, Ahead]:
    tensors = Tensors()
    ahead = Ahead(tensors, SIZES, limit)
    tensors.read.clear()  # a type check of the argument reads one
    return tensors, ahead


def test_the_next_are_read_by_a_thread_up_to_a_limit():
    tensors, ahead = opened(2 * SIZE)
    for i, name in enumerate(NAMES[:3]):
        np.testing.assert_array_equal(ahead[name], np.full(10, i))
        ahead._thread.submit(int).result()  # what was started is done
        assert sorted(x for x, _ in tensors.read) == NAMES[: i + 3]
    here = threading.get_ident()
    assert [x for x, by in tensors.read if by == here] == ["w0"]
    with pytest.raises(CheckpointError, match="w3 is damaged"):  # not before
        ahead["w3"]
    assert ahead["w4"][0] == 4 and ahead["w5"][0] == 5


def test_one_larger_than_the_limit_is_read_ahead_alone():
    tensors, ahead = opened(1)
    assert ahead["w0"][0] == 0
    ahead._thread.submit(int).result()
    assert sorted(x for x, _ in tensors.read) == NAMES[:2]


def test_any_order_gives_the_same():
    _, ahead = opened(2 * SIZE)
    for name in ("w1", "w0", "w1", "w5", "w2", "w2"):
        assert ahead[name][0] == int(name[1])
    assert "w9" not in ahead and len(ahead) == 6
