"""Regular expressions of others: they match as `re` does, or end in an error."""

import io
import re

import pytest

from qlora_jax import match_worker, matching
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.peft.settings import targeted

EVIL = "a?" * 30 + "x"


@pytest.fixture
def impatient(monkeypatch):
    """Makes the process that matches one that is new, and gives up at once."""
    made = matching._Process(("0.1",))
    monkeypatch.setattr(matching, "_PROCESS", made)
    yield
    made.stop()


@pytest.mark.parametrize("text", ["", "layers.3.q is é 4\n", "a" * 1000 + "\ud800"])
@pytest.mark.parametrize("pattern", [r"(\w+)?.*", r"(a|b){1,9}|(?:is)? (\d+|é)", "a+$"])
def test_matches_are_those_of_re(pattern, text):
    def groups(found):
        return None if found is None else [found[0], *found.groups()]

    assert matching.fullmatch(pattern, text) == groups(re.fullmatch(pattern, text))
    assert matching.match(pattern, text) == groups(re.match(pattern, text))
    *_, last = (None, *re.finditer(pattern, text))
    assert matching.last(pattern, text) == groups(last)


def test_a_pattern_that_takes_too_long_is_an_error_and_the_next_one_is_matched(
    impatient,
):
    for _ in range(2):
        with pytest.raises(ConfigError, match="takes too long on a text of 30 char"):
            matching.fullmatch(EVIL, "a" * 30)
        assert matching.fullmatch("(a|b){2}", "ab") == ["ab", "b"]


def test_many_matches_that_are_each_in_time_are_too_long_together(monkeypatch):
    allowed = []
    monkeypatch.setattr(
        match_worker.signal,
        "setitimer",
        lambda _, seconds: allowed.append(seconds) or (0.0, 0.0),
    )
    match_worker.serve(['["match", "a", "a"]'] * 3, io.StringIO(), seconds=6.0)
    assert allowed[::2] == pytest.approx([5.0, 1.0, 0.05], abs=0.01)


def test_the_names_of_modules_are_matched_under_the_limit(impatient):
    module = "model.layers.0." + "a" * 30
    with pytest.raises(ConfigError, match="takes too long"):
        LoRAConfig(targets=f".*{EVIL}").matches(module)
    with pytest.raises(ConfigError, match="takes too long"):
        targeted({"target_modules": f".*{EVIL}"}, module)
    kept = {"target_modules": ["q"], "layers_to_transform": 3}
    kept["layers_pattern"] = ["(layers|h)"]
    assert targeted(kept, "model.layers.3.q")
    assert not targeted(kept, "model.layers.2.q")
