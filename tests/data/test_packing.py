"""Packs, groups and lengths, of lengths alone."""

import itertools

import numpy as np
import pytest

from qlora_jax.data import packing
from qlora_jax.data.packing import chosen_lengths, grouped, pack, rounded

RNG = np.random.default_rng(0)
GSM8K = np.clip(RNG.lognormal(5.2, 0.4, 4000), 40, 600).astype(np.int32)
"""Lengths as gsm8k's are."""
KINDS = {
    "like gsm8k": (GSM8K, 800),
    "uniform": (RNG.integers(2, 1024, 2000), 1024),
    "short": (RNG.integers(2, 30, 3000), 1024),
    "of one length": (np.full(1001, 100), 1024),
    "larger than a pack": (RNG.integers(900, 2000, 500), 1000),
    "one": (np.array([5]), 1024),
    "two that fit": (np.array([512, 512]), 1024),
    "two that do not": (np.array([513, 512]), 1024),
}


def totals(lengths: np.ndarray, packs: packing.Packs) -> np.ndarray:
    return np.add.reduceat(lengths[packs.documents], packs.starts[:-1])


@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_in_one_pack_that_has_room_for_it(kind, window):
    lengths, capacity = KINDS[kind]
    packs = pack(lengths, capacity, window)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    assert packs.starts[0] == 0 and packs.starts[-1] == len(lengths)
    each = np.diff(packs.starts)
    assert each.min() >= 1
    assert ((totals(lengths, packs) <= capacity) | (each == 1)).all()


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("like gsm8k", 0.005),
        ("uniform", 0.03),
        ("short", 0.05),
        ("of one length", 0.04),
    ],
)
def test_next_to_nothing_of_packs_is_empty(kind, most):
    lengths, capacity = KINDS[kind]
    count = len(pack(lengths, capacity).starts) - 1
    assert 0 <= 1 - lengths.sum() / (capacity * count) < most


def test_packs_are_no_more_than_needed_where_that_is_known():
    # Halves, thirds and quarters of a pack, each as often as to fill whole ones.
    lengths = RNG.permutation(np.repeat([500, 333, 334, 250], [20, 20, 10, 40]))
    assert len(pack(lengths, 1000).starts) - 1 == 30


def test_the_order_decides_which_documents_of_a_length_share_a_pack():
    one, again = (pack(GSM8K, 800) for _ in range(2))
    np.testing.assert_array_equal(one.documents, again.documents)
    order = np.random.default_rng(1).permutation(len(GSM8K))
    other = pack(GSM8K[order], 800)

    def together(documents: np.ndarray, packs: packing.Packs) -> set[frozenset[int]]:
        parts = np.split(documents[packs.documents], packs.starts[1:-1])
        return {frozenset(part.tolist()) for part in parts}

    shared = together(np.arange(len(GSM8K)), one) & together(order, other)
    assert len(shared) < 0.05 * (len(one.starts) - 1)


def test_patterns_are_as_few_as_different_lengths():
    # So that the time to pack does not grow with the documents.
    lengths = np.tile(GSM8K, 20)
    patterns = packing._patterns(lengths, 800)
    assert len(patterns) < 2 * len(np.unique(lengths))
    assert sum(len(pattern) * times for pattern, times in patterns) == len(lengths)


@pytest.mark.parametrize("lead", [0, 3])
def test_groups_are_of_like_lengths_and_what_is_no_whole_step_stays(lead):
    each, steps = 8, 60
    sizes = RNG.integers(1, 1000, lead + each * steps + 5)
    order = grouped(sizes, lead, each, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert order[:lead].tolist() == list(range(lead))
    assert order[-5:].tolist() == list(range(len(sizes) - 5, len(sizes)))
    groups = sizes[order][lead:-5].reshape(steps, each)
    spread = groups.max(axis=1) - groups.min(axis=1)
    assert spread.mean() < 200 < np.ptp(sizes[lead:-5].reshape(steps, each), 1).mean()
    assert (np.diff(groups[:, 0]) < 0).any()  # steps do not go from short to long


def test_too_few_rows_for_a_step_keep_their_order():
    sizes = np.array([3, 1, 2])
    for lead in (0, 2, 5):
        order = grouped(sizes, lead, 4, np.random.default_rng(0))
        assert order.tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_lengths_pad_the_least(count, seed, monkeypatch):
    monkeypatch.setattr(packing, "WORTH", 0)
    rng = np.random.default_rng(seed)
    longest = np.clip(rng.lognormal(5, 0.7, 60), 8, 900).astype(int)
    most = 950
    chosen = chosen_lengths(longest, most, 1024, count)
    assert len(chosen) <= count and chosen[-1] == rounded(most, 1024)
    assert list(chosen) == sorted(set(chosen))

    def cost(lengths: tuple[int, ...]) -> int:
        return sum(min(n for n in lengths if n >= one) for one in longest.tolist())

    some = sorted({rounded(one, 1024) for one in longest.tolist()} - {chosen[-1]})
    ways = itertools.combinations(some, min(count, len(some) + 1) - 1)
    assert cost(chosen) == min(cost((*way, chosen[-1])) for way in ways)


def test_lengths_that_save_little_are_not_taken():
    assert chosen_lengths(np.full(50, 800), 800, 1024) == (800,)
    assert chosen_lengths(np.array([760] + [800] * 99), 800, 1024) == (800,)
    assert chosen_lengths(np.array([64] * 50 + [800] * 50), 800, 1024) == (64, 800)
    assert chosen_lengths(np.array([], int), 70, 1024) == (80,)


@pytest.mark.parametrize(
    ("length", "max_tokens", "result"),
    [(1, 1024, 32), (33, 1024, 48), (513, 1024, 544), (1025, 4096, 1088)]
    + [(2049, 4096, 2176), (1000, 1000, 1000), (990, 1000, 992), (999, 1000, 1000)]
    + [(20, 10, 20)],
)
def test_a_length_is_rounded_up_by_little(length, max_tokens, result):
    assert rounded(length, max_tokens) == result
    assert rounded(result, max(max_tokens, result)) == result
