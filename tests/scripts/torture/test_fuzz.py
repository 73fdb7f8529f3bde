"""The short form of the fuzzing: some damaged inputs of each reader, and what once failed."""

import json

import pytest

from qlora_jax.text import limits
from scripts.torture import fuzz
from scripts.torture.readers import READERS

pytest.importorskip("gguf")
pytest.importorskip("pyarrow")

KEPT = {
    "bnb": ((1, 575), (2, 76)),
    "config": ((0, 1), (0, 4), (0, 5), (0, 6), (0, 27), (0, 56), (0, 74), (0, 97)),
    "arrays": ((2026, 41),),
    "rows": ((1, 84), (2026, 378)),
    "template": ((0, 0), (1, 181)),
    "tokenizer": ((0, 5), (0, 9), (0, 14), (0, 18), (0, 25), (0, 142), (2, 133)),
}
"""Reader -> (seed, case) of inputs that ended in a traceback, or took too long."""


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_refused(name, monkeypatch):
    fuzz.quiet(monkeypatch.setenv)
    monkeypatch.setattr(limits, "MAX_STEPS", 50_000)
    cases = [*range(3 if READERS[name].heavy else 12)]
    wanted = {7: cases}
    for seed, case in KEPT.get(name, ()):
        wanted.setdefault(seed, []).append(case)
    with fuzz.limited():
        for seed, numbers in wanted.items():
            row = fuzz.run_reader(name, seed, numbers)
            assert row["cases"] == len(numbers)
            assert not row["failed"], json.dumps(row["failed"])


def test_a_reader_that_fails_is_seen(monkeypatch):
    def broken(folder):
        raise TypeError("unexpected")

    monkeypatch.setitem(READERS, "metrics", READERS["metrics"]._replace(read=broken))
    monkeypatch.setattr(fuzz, "read_good", lambda *_: None)
    row = fuzz.run_reader("metrics", 0, [0, 1])
    assert row["traceback"] == 2
    (failed,) = row["failed"]
    assert failed.startswith("traceback: TypeError at test_fuzz.py")
