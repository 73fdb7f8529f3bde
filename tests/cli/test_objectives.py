"""Objectives from the command line: settings, a reference asked beforehand, a teacher."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.cli.main import main
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.config.run import RunConfig
from qlora_jax.data import DataConfig, Dataset
from qlora_jax.data.fields import REFERENCE
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.steps import read_position
from qlora_jax.objectives import reference
from qlora_jax.objectives.reference import reference_values, with_reference
from qlora_jax.train.metrics import read_metrics

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = [
    {"prompt": f"after {LETTERS[i]}:", "chosen": f" {LETTERS[i + 1]}", "rejected": " ?"}
    for i in range(6)
]
SAME = 1e-5
"""Relative: the reference is another compiled program beforehand than inside of a step."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", PAIRS)


def run(base: Path, data: Path, out: Path, *more: Any) -> int:
    args = ["--model", base, "--data", data, "--out", out, "--lora.targets", "q_proj"]
    args += ["--train.micro-batch", 2, "--train.grad-accum", 1, "--train.max-steps", 2]
    args += ["--train.compute-dtype", "float32", "--train.learning-rate", 0.01, *more]
    return main(["train", *map(str, args)])


def test_a_reference_asked_beforehand_changes_nothing(
    base: Path, pairs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.setenv("QLORA_JAX_DATA_CACHE", str(tmp_path / "kept"))
    before = "--objective.precompute-reference"
    assert run(base, pairs, tmp_path / "a", "--objective", "dpo") == 0
    assert run(base, pairs, tmp_path / "b", "--objective=dpo", before) == 0
    assert "asked once about 6 rows" in capsys.readouterr().err
    monkeypatch.setattr(reference, "reference_values", None)  # they are kept
    assert run(base, pairs, tmp_path / "c", "--objective", "dpo", before) == 0
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "abc"]
    for name in ("loss", "rewards_margins", "logps_chosen"):
        a, b, c = ([row[name] for row in some] for some in rows)
        assert a == pytest.approx(b, rel=SAME, abs=SAME) and b == c
    assert rows[0][0]["loss"] == pytest.approx(np.log(2), rel=SAME)
    assert rows[0][1]["loss"] < np.log(2) - 1e-3


def test_a_run_goes_on_with_its_objectives_settings_alone(
    base: Path, pairs: Path, tmp_path: Path, capsys: Any
):
    out = tmp_path / "run"
    assert run(base, pairs, out, "--objective", "simpo", "--objective.gamma", 1) == 0
    position = read_position(out / "checkpoints" / "2")
    assert position["objective"] == "simpo" and position["objective.gamma"] == 1
    again = ["train", "--resume", str(out), "--train.max-steps", "3"]
    assert main([*again, "--objective.beta", "1"]) == 2
    assert "--objective.beta is 1.0, it was None" in capsys.readouterr().err
    assert main(again) == 0


def test_what_a_teacher_says_is_learnt(base: Path, tmp_path: Path, capsys: Any):
    texts = tiny.write_jsonl(tmp_path / "texts.jsonl", tiny.sums(4))
    taught = tmp_path / "taught.jsonl"
    args = ["--model", base, "--data", texts, "--out", taught, "--top-k", 8]
    args += ["--dtype", "float32", "--temperature", 2]
    assert main(["teach", *map(str, args)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.02 < figures["probability_of_top"] < 1 and figures["rows"] == 4
    assert main(["teach", *map(str, args)]) == 2  # it is there already
    # By numpy, of all logits.
    rows = [json.loads(line) for line in taught.read_text().splitlines()]
    tokens = jnp.array([rows[0]["input_ids"]])
    logits = tiny.logits(tiny.decoder(), tokens)[0].astype(np.float64) / 2
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place in (1, len(tokens[0]) - 1):
        order = np.argsort(-logp[place - 1])[:8]
        assert rows[0]["teacher_ids"][place] == order.tolist()
        said = rows[0]["teacher_logprobs"][place]
        np.testing.assert_allclose(said, logp[place - 1][order], atol=2e-5)
    # The teacher itself has nothing to learn from it.
    more = ["--objective", "distill", "--objective.temperature", 2]
    more += ["--quant.codebook", "none"]
    assert run(base, taught, tmp_path / "run", *more) == 0
    (first, *_) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert abs(first["loss"]) < 1e-4
    assert run(base, texts, tmp_path / "other", "--objective", "distill") == 2
    assert "`qlora teach` writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sft", "beta": 0.2},
            "--objective.beta is 0.2, and --objective sft does",
        ),
        ({"name": "orpo", "precompute_reference": True}, "it is for dpo, kto"),
        (
            {"name": "dpo", "loss": "ipo", "label_smoothing": 0.1},
            "is for sigmoid, robust",
        ),
        ({"name": "dpo", "label_smoothing": 0.5}, "expected less than 0.5"),
        ({"name": "a:B", "gamma": 1.0}, "--objective a:B does not read it"),
        ({"name": "dpo", "beta": 0.0}, "--objective.beta is 0.0, expected > 0"),
        ({"name": "kto", "desirable_weight": -1.0}, "is -1.0, expected 0 or more"),
        ({"name": "kto", "beta": -1.0, "gamma": 1.0}, r"\(2 problems\)"),
    ],
)
def test_a_setting_that_has_no_effect_or_no_sense_is_refused(
    settings: Any, message: str
):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LoRAConfig(init="pissa")}, "pissa makes another base"),
        ({"data": DataConfig(train_on_prompt=True)}, "no effect with --objective dpo"),
        ({"lora": LoRAConfig(bias="all")}, "--lora.bias all: with what trains"),
        ({"lora": LoRAConfig(modules_to_save="norm")}, "precompute-reference asks"),
    ],
)
def test_settings_that_do_not_go_with_an_objective_are_refused(
    settings: Any, message: str
):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig(objective=ObjectiveConfig(name="dpo"), **settings)
    RunConfig(objective=ObjectiveConfig(name="orpo"), **settings)


def test_a_reference_is_the_base_where_something_of_it_trains_in_place():
    rows = tiny.rows((5, 9)).rows
    data = Dataset([rows[0]._replace(other=rows[1])], 9)
    wanted = reference_values(tiny.decoder(), rows, 2)
    kinds: tuple[dict[str, Any], ...] = ({}, {"modules_to_save": "norm"})
    for more in kinds:
        model = tiny.adapted(tiny.decoder(), zero=True, **more)
        (row,) = with_reference(data, model, 1).rows
        found = [one.extras[REFERENCE] for one in (row, row.other) if one is not None]
        np.testing.assert_allclose(found, wanted, rtol=SAME)
    trained = tiny.adapted(tiny.decoder(), modules_to_save="norm")
    with pytest.raises(AdapterMismatchError, match="norm.weight trained in place"):
        with_reference(data, trained, 1)
