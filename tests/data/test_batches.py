"""Batches of a run: what each has, and that they are pure functions of the step."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_jax.data import Dataset
from qlora_jax.data.batches import Batches, Resolved, resolve
from qlora_jax.data.layout import padded_length
from qlora_jax.data.order import Share, epoch_order
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError

WAYS: tuple[Resolved, ...] = ("on", "off", "drawn")
RNG = np.random.default_rng(0)
LENGTHS = np.clip(RNG.lognormal(3.4, 0.5, 203), 4, 120).astype(int).tolist()


def row(number: int, length: int, **more: Any) -> Row:
    """Returns a row that its tokens tell from all others; its first third is prompt."""
    weights = np.zeros(length, np.float32)
    weights[max(1, length // 3) :] = np.linspace(1, 2, length - max(1, length // 3))
    if number % 3 == 0:
        weights[0] = 1  # a text trains from its first token on
    return Row(np.full(length, number + 1, np.int32), weights, 1, "", **more)


def rows_of(lengths: Any = LENGTHS, max_tokens: int = 128, **more: Any) -> Dataset:
    return Dataset([row(i, n) for i, n in enumerate(lengths)], max_tokens, **more)


def batches_of(data: Dataset, packing: Resolved, **settings: Any) -> Batches:
    given = {"documents": 8, "micro_batch": 4, "seed": 3, **settings}
    return data.batches(packing=packing, **given)


def flat(batch: dict[str, np.ndarray], axes: int = 2) -> dict[str, np.ndarray]:
    """Returns a batch whose micro-batches stand one below the other."""
    if batch["tokens"].ndim == axes:
        return batch
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def found(data: Dataset, batch: dict[str, np.ndarray]) -> list[int]:
    """Returns the numbers of the documents of a batch; checks each and the padding."""
    batch, numbers = flat(batch), []
    packed = "segment_ids" in batch
    for i, tokens in enumerate(batch["tokens"]):
        start, segment = 0, 0
        while start < len(tokens) and tokens[start]:
            number = int(tokens[start]) - 1
            numbers.append(number)
            one = data.rows[number]
            end, segment = start + len(one.tokens), segment + 1
            np.testing.assert_array_equal(tokens[start:end], one.tokens)
            weights = one.weights.copy()
            if packed:
                weights[0] = 0
                positions = batch["positions"][i, start:end]
                np.testing.assert_array_equal(positions, np.arange(end - start))
                assert (batch["segment_ids"][i, start:end] == segment).all()
            np.testing.assert_array_equal(batch["weights"][i, start:end], weights)
            start = end
            if not packed:
                break
        rest = slice(start, None)
        assert not tokens[rest].any() and not batch["weights"][i, rest].any()
        if packed:
            positions = batch["positions"][i, rest]
            np.testing.assert_array_equal(positions, np.arange(len(positions)))
            assert not batch["segment_ids"][i, rest].any()
    return numbers


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


SIZES = {
    "many": LENGTHS,
    "as many as a step": [20] * 8,
    "fewer than a step": [9, 30, 17],
    "one": [21],
    "all as long as may be": [128] * 19,
    "longer than the documents of a step": [100, *[4] * 60, 128, 128],
}


@pytest.mark.parametrize("packing", WAYS)
@pytest.mark.parametrize("kind", SIZES)
def test_every_document_comes_once_an_epoch_and_whole(kind, packing):
    data = rows_of(SIZES[kind])
    batches = batches_of(data, packing)
    count, epochs = len(data), 3
    steps = batches.steps(epochs)
    drawn = [found(data, batches.at(step)) for step in range(steps)]
    numbers = [one for step in drawn for one in step]
    # The last step goes on in the next epoch.
    assert epochs * count <= len(numbers) < epochs * count + len(drawn[-1]) + 1
    for epoch in range(epochs):
        of_epoch = numbers[epoch * count : (epoch + 1) * count]
        assert sorted(of_epoch) == list(range(count))
    assert drawn == [batches.numbers(step) for step in range(steps)]


@pytest.mark.parametrize("packing", WAYS)
def test_sources_keep_their_weights(packing):
    shares = [Share(np.arange(60), 2.0), Share(np.arange(60, 203), 0.3)]
    data = rows_of(shares=shares)
    batches = batches_of(data, packing)
    count = 120 + 43
    assert batches.steps(1.0) == pytest.approx(count / batches.documents, abs=1)
    steps = range(batches.steps(3))
    numbers = [one for step in steps for one in batches.numbers(step)]
    taken = Counter[int]()
    for epoch in range(3):
        of_epoch = Counter(numbers[epoch * count : (epoch + 1) * count])
        assert all(of_epoch[i] == 2 for i in range(60)) and of_epoch.total() == count
        taken += Counter({i: n for i, n in of_epoch.items() if i >= 60})
    assert set(taken.values()) == {1}  # three times other 30 %


@pytest.mark.parametrize("packing", WAYS)
def test_a_batch_follows_from_step_and_seed_alone(packing):
    data = rows_of()
    steps = [0, 60, 3, 25, 26, 24, 3, 110]
    going, ahead = batches_of(data, packing), {}
    for step in range(111):
        ahead[step] = going.at(step)
    for step in steps:
        assert equal(batches_of(data, packing).at(step), ahead[step])
    again = batches_of(data, packing)
    assert all(equal(again.at(step), ahead[step]) for step in steps)
    other = batches_of(data, packing, seed=4)
    assert not any(equal(other.at(step), ahead[step]) for step in (0, 3, 60))


@pytest.mark.parametrize("packing", WAYS)
def test_epochs_differ(packing):
    batches = batches_of(rows_of(), packing)
    per = batches.steps(1)
    epochs = [
        {frozenset(batches.numbers(epoch * per + step)) for step in range(per - 1)}
        for epoch in range(3)
    ]
    assert len(epochs[0] & epochs[1]) < 0.2 * per > len(epochs[1] & epochs[2])


@pytest.mark.parametrize("packing", WAYS)
def test_a_step_is_the_same_however_it_is_split(packing):
    data, micro_batches = rows_of(), (1, 2, 3, 4, 8, 100)
    several = [batches_of(data, packing, micro_batch=n) for n in micro_batches]
    for step in (0, 7, 40):
        whole = flat(several[-1].at(step))
        for size, batches in zip(micro_batches, several, strict=True):
            batch = batches.at(step)
            assert batch["tokens"].shape in batches.shapes
            assert batch["tokens"].shape[-2] <= size
            rows, filled = flat(batch), len(whole["tokens"])
            assert equal({name: x[:filled] for name, x in rows.items()}, whole)
            assert not rows["weights"][filled:].any()
            assert batches.numbers(step) == several[-1].numbers(step)
    assert {batches.steps(2.5) for batches in several} == {several[0].steps(2.5)}


@pytest.mark.parametrize("packing", WAYS)
@pytest.mark.parametrize("documents", [1, 4, 16, 64])
def test_shapes_are_known_and_padding_is_as_said(packing, documents):
    data = rows_of()
    batches = batches_of(data, packing, documents=documents)
    assert packing == "drawn" or len(batches.lengths) <= 3
    shapes = [batches.at(step)["tokens"].shape for step in range(batches.steps(4))]
    assert set(shapes) <= set(batches.shapes)
    first = [batches.at(step) for step in range(batches.steps(1))]
    lengths = Counter(batch["tokens"].shape[-1] for batch in first)
    assert lengths == batches.steps_by_length
    used = sum(int(np.count_nonzero(batch["tokens"])) for batch in first)
    laid = sum(batch["tokens"].size for batch in first)
    assert batches.padding == pytest.approx(1 - used / laid)
    for length in batches.lengths:
        assert packing == "drawn" or str(length) in batches.said()


@pytest.mark.parametrize("documents", [8, 16, 32, 64])
def test_packing_takes_padding_away_and_leaves_a_step_its_documents(documents):
    data = rows_of(np.tile(np.array(LENGTHS) * 4, 8).tolist(), max_tokens=1024)
    on, off, drawn = (batches_of(data, way, documents=documents) for way in WAYS)
    assert on.padding < 0.02 and off.padding < 0.38 and drawn.padding > 0.5
    assert on.documents == pytest.approx(documents, rel=0.1)
    assert off.documents == drawn.documents == documents
    for epochs in (0.3, 1, 2, 2.5):
        assert on.steps(epochs) == pytest.approx(off.steps(epochs), rel=0.1, abs=1)
        assert off.steps(epochs) == drawn.steps(epochs)
        assert off.steps(epochs) == -(-int(epochs * len(data)) // documents)


def test_rows_of_a_few_long_documents_do_not_pad_the_others():
    # What a step has is 80 tokens, and one document in a hundred is longer.
    data = rows_of(([20] * 99 + [1000]) * 8, max_tokens=1024)
    batches = batches_of(data, "on", documents=4)
    assert batches.documents == pytest.approx(4, rel=0.1)
    assert batches.lengths[0] < 150 and batches.lengths[-1] == 1024
    assert batches.padding < 0.3


@pytest.mark.parametrize("weights", [False, True])
def test_rows_come_as_drawn_bit_for_bit_as_before(weights):
    """The order that runs had before packing, written down once more."""
    shares = [Share(np.arange(60), 2.0), Share(np.arange(60, 203), 0.3)]
    data = rows_of(shares=shares if weights else ())
    batches = batches_of(data, "drawn", documents=6, micro_batch=3)
    size = data.epoch_rows

    def order(epoch: int) -> list[int]:
        drawn = np.random.default_rng((3, 0, epoch)).permutation(size)
        if not weights:
            return drawn.tolist()
        rows = []
        for i, share in enumerate(shares):
            place = epoch * share.count
            for at in range(place, place + share.count):
                seed = (3, 3, i, at // len(share.rows))
                turn = np.random.default_rng(seed).permutation(len(share.rows))
                rows.append(int(share.rows[turn[at % len(share.rows)]]))
        return [rows[i] for i in drawn.tolist()]

    stream = [one for epoch in range(3) for one in order(epoch)]
    assert epoch_order(203, data.shares, 3, 1).tolist() == order(1)
    for step in range(3 * size // 6):
        some = [data.rows[i] for i in stream[6 * step : 6 * step + 6]]
        length = padded_length(max(len(one.tokens) for one in some), 128)
        for name in ("tokens", "weights"):
            rows = [np.pad(getattr(x, name), (0, length - len(x.tokens))) for x in some]
            batch = batches.at(step)
            assert list(batch) == ["tokens", "weights"]
            np.testing.assert_array_equal(batch[name], np.reshape(rows, (2, 3, length)))


@pytest.mark.parametrize("packing", WAYS)
@pytest.mark.parametrize("kind", SIZES)
def test_evaluation_has_every_row_once(kind, packing):
    data = rows_of(SIZES[kind])
    every = data.every(4, packing)
    batches = list(every)
    assert len(batches) == len(every)
    numbers = [one for batch in batches for one in found(data, batch)]
    assert sorted(numbers) == list(range(len(data)))
    shapes = {batch["tokens"].shape for batch in batches}
    assert shapes <= set(every.shapes)
    assert packing == "drawn" or len(every.lengths) <= 3
    assert all(equal(a, b) for a, b in zip(batches, every, strict=True))


def test_evaluation_of_many_rows_has_little_padding():
    data = rows_of()
    used = sum(len(one.tokens) for one in data.rows)
    laid = [sum(b["tokens"].size for b in data.every(8, way)) for way in WAYS]
    on, off, drawn = (1 - used / one for one in laid)
    assert on < 0.1 and off < 0.35 and drawn < 0.35


def test_a_file_sorted_by_length_is_evaluated_with_as_little_padding():
    data = rows_of(sorted(LENGTHS * 10))
    laid = sum(batch["tokens"].size for batch in data.every(8, "on"))
    assert 1 - sum(LENGTHS) * 10 / laid < 0.02


# --- pairs and extras


def pair(number: int, length: int, other: int, **more: Any) -> Row:
    return row(number, length, other=row(100 + number, other, **more), **more)


@pytest.mark.parametrize("packing", ["off", "drawn"])
def test_the_other_of_a_row_comes_directly_after_it(packing):
    lengths = RNG.integers(4, 100, (30, 2)).tolist()
    rows = [
        pair(i, *both, extras={"reference": np.float64(i / 2)})
        for i, both in enumerate(lengths)
    ]
    data = Dataset(rows, 128)
    batches = batches_of(data, packing, documents=6, micro_batch=2)
    seen = []
    for step in range(batches.steps(1)):
        batch = batches.at(step)
        assert batch["tokens"].shape in batches.shapes
        assert batch["tokens"].shape[:2] == (3, 4)
        assert batch["reference"].shape == (3, 4)
        rows_ = flat(batch)
        for i in range(0, 12, 2):
            number = int(rows_["tokens"][i, 0]) - 1
            seen.append(number)
            chosen = data.rows[number]
            assert chosen.other is not None
            for at, one in ((i, chosen), (i + 1, chosen.other)):
                end = len(one.tokens)
                np.testing.assert_array_equal(rows_["tokens"][at, :end], one.tokens)
                np.testing.assert_array_equal(rows_["weights"][at, :end], one.weights)
                assert not rows_["tokens"][at, end:].any()
                assert rows_["reference"][at] == np.float32(number / 2)
    assert seen == [n for step in range(5) for n in batches.numbers(step)]
    assert sorted(seen) == list(range(30)) and "pairs" in batches.said()
    used = sum(map(sum, lengths))
    laid = sum(batches.at(step)["tokens"].size for step in range(5))
    assert batches.padding == pytest.approx(1 - used / laid)
    last = list(data.every(4, packing))[-1]
    assert last["tokens"].shape[0] == 8 and not last["weights"][4:].any()


def test_extras_of_tokens_and_of_rows_are_laid_beside_their_rows():
    rows = [
        row(
            i,
            n,
            extras={
                "teacher": np.arange(2 * n).reshape(n, 2) + 1,
                "kind": np.int64(i + 7),
                **({"more": np.ones(n, np.float32)} if i % 2 else {}),
            },
        )
        for i, n in enumerate([5, 9, 4, 7])
    ]
    (batch,) = Dataset(rows, 16).every(6, "off")
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "tokens": ((6, 16), "int32"),
        "weights": ((6, 16), "float32"),
        "teacher": ((6, 16, 2), "int32"),
        "kind": ((6,), "int32"),
        "more": ((6, 16), "float32"),
    }
    for at in range(4):
        number = int(batch["tokens"][at, 0]) - 1
        end = len(rows[number].tokens)
        teacher = rows[number].extras["teacher"]
        np.testing.assert_array_equal(batch["teacher"][at, :end], teacher)
        assert not batch["teacher"][at, end:].any() and batch["kind"][at] == number + 7
        assert batch["more"][at].sum() == (end if number % 2 else 0)
    assert not batch["kind"][4:].any() and not batch["teacher"][4:].any()
    run = Dataset(rows, 16).batches(documents=4, micro_batch=2, seed=0, packing="off")
    shapes = {name: x.shape for name, x in run.at(0).items()}
    assert shapes["teacher"] == (2, 2, 16, 2) and shapes["kind"] == (2, 2)


def test_extras_of_tokens_are_packed_with_them():
    rows = [
        row(i, n, extras={"twice": np.full(n, 2 * i)}) for i, n in enumerate(LENGTHS)
    ]
    data = Dataset(rows, 512)
    batch = batches_of(data, "on").at(1)
    there = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["twice"], (2 * batch["tokens"] - 2) * there)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair(0, 5, 6), row(1, 5)], "1 of 2 rows have no row beside them"),
        (
            [
                row(0, 5, extras={"a": np.zeros(5)}),
                row(1, 5, extras={"a": np.zeros(())}),
            ],
            "have 'a' in different forms",
        ),
    ],
)
def test_rows_that_are_not_alike_are_refused(rows, message):
    data = Dataset(rows, 16)
    for make in (lambda: batches_of(data, "off"), lambda: data.every(2, "off")):
        with pytest.raises(DataError, match=message):
            make()


@pytest.mark.parametrize(
    ("more", "packs", "message"),
    [
        ({}, False, "objective mine takes rows of one document"),
        ({"other": row(9, 4)}, True, "rows are pairs"),
        ({"adapter": "a"}, True, "rows name their adapters"),
        ({"extras": {"kind": np.int32(1)}}, True, "rows have 'kind'"),
    ],
)
def test_packing_is_off_where_it_cannot_be_and_refused_where_it_was_asked_for(
    more, packs, message
):
    data = Dataset([row(i, 8, **more) for i in range(3)], 16)
    assert resolve("auto", data, packs, "mine") == "off"
    for way in ("off", "drawn"):
        assert resolve(way, data, packs, "mine") == way
    with pytest.raises(
        ConfigError, match=f"--data.packing on: {message}.*; choose auto"
    ):
        resolve("on", data, packs, "mine")
    if packs:
        for make in (lambda: batches_of(data, "on"), lambda: data.every(2, "on")):
            with pytest.raises(ConfigError, match=f"cannot be packed: {message}"):
                make()


def test_packing_is_on_where_it_can_be():
    data = Dataset([row(i, 8, extras={"a": np.zeros(8)}) for i in range(3)], 16)
    assert (
        resolve("auto", data, True, "sft") == resolve("on", data, True, "sft") == "on"
    )


def test_a_batch_may_be_made_in_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    data = rows_of()
    alone = [batches_of(data, "on").at(step) for step in range(0, 90, 10)]
    batches = batches_of(data, "on")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(batches.at, range(0, 90, 10)))
    assert all(equal(a, b) for a, b in zip(alone, made, strict=True))


def test_load_dataset_takes_rows_by_length_and_packs_when_asked(tmp_path):
    from qlora_jax.data import DataConfig, load_dataset

    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(40))
    plain = list(load_dataset(path, tiny.tokenizer(), 4, 64))
    assert len(plain) == 10 and all(b.keys() == {"tokens", "weights"} for b in plain)
    config = DataConfig(packing="on")
    packed = list(load_dataset(path, tiny.tokenizer(), 4, 64, config=config))
    assert {"positions", "segment_ids"} < packed[0].keys()
    total = sum(int((batch["segment_ids"].max(axis=-1)).sum()) for batch in packed)
    assert total >= 40 > sum(batch["tokens"].shape[0] for batch in packed)
