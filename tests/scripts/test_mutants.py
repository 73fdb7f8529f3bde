"""Each mutant of scripts/make/mutants.py changes a line that there is."""

from pathlib import Path

import pytest

from scripts.make.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_line_is_there_once_and_its_tests_are_too(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests.split():
        assert (ROOT / test.partition("::")[0]).exists()
