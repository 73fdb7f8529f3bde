"""An objective of one's own through the step, the Trainer and the command, and refusals."""

import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tomli_w

import qlora_jax as qlora
from qlora_jax.adapters import join, split
from qlora_jax.cli import begin
from qlora_jax.cli.main import main
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.config.run import FILE, read_run
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import CheckpointError, ConfigError
from qlora_jax.objectives import Objective, make_objective, of_hidden_states
from qlora_jax.objectives.base import RESERVED
from qlora_jax.toml import _nones, _without_none, read_toml, write_toml
from qlora_jax.train.loop import Trainer
from qlora_jax.train.metrics import read_metrics
from qlora_jax.train.step import make_eval_step, make_train_step

ROOT = Path(__file__).parents[2]
SUM_ORDER = 1e-5
"""Relative, float32: sums over chunks and micro-batches differ in order."""
LENGTHS = (12, 5, 9, 7)
"""Unequal, so that a mean of means would not be the mean."""


def test_the_loop_that_the_docs_show_learns_a_preference(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    rows = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no"} for i in range(80)]
    tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    names = {
        "model": tiny.adapted(tiny.decoder(), zero=True),
        "tokenizer": tiny.tokenizer(),
    }
    exec(
        compile(code, "objectives.md", "exec"),
        {"qlora": qlora, "optax": optax, **names},
    )
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def focal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The module that CONTRIBUTING.md shows, on Python's path."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Adding an objective")[2].partition("\n## ")[0]
    assert "--objective focal:FOCAL" in section
    folder = tmp_path_factory.mktemp("path")
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    (folder / "focal.py").write_text(found.group(1))
    (folder / "broken.py").write_text("import nowhere_to_be_found\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import focal  # pyright: ignore[reportMissingImports]

        yield focal
    for name in ("focal", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def by_rows(focal: types.ModuleType) -> Objective:
    """Computes the loss a row, where sft's is a token's, and a metric with a normalizer of its
    own."""

    def loss(head: Any, hidden: Any, batch: Any) -> tuple[Any, dict]:
        total, metrics = focal.loss(head, hidden, batch)
        odd = batch["tokens"] % 2 * batch["weights"]
        return total, {**metrics, "odd": (jnp.sum(odd), jnp.sum(batch["weights"]))}

    return of_hidden_states(
        "focal by rows",
        loss,
        normalizer=lambda batch: jnp.float32(batch["tokens"].shape[0]),
    )


@pytest.fixture(scope="module")
def parts() -> Any:
    return split(tiny.adapted(tiny.quantized(), targets="q_proj,down_proj"))


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    rows = tiny.batch(LENGTHS)
    return {name: jnp.asarray(x) for name, x in rows.items()}


@pytest.fixture(scope="module")
def wanted(parts: Any, batch: Any) -> tuple[dict[str, float], list[np.ndarray]]:
    """Metrics and gradient of `by_rows`, of all logits at once, without accumulation."""
    graphdef, lora, base = parts
    tokens, weights = batch["tokens"], batch["weights"][:, 1:]

    def of(lora: Any) -> tuple[Any, Any]:
        logp = jax.nn.log_softmax(join(graphdef, lora, base)(tokens))[:, :-1]
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        p = jnp.exp(logp)
        loss = -jnp.sum(weights * (1 - p) * logp) / len(tokens)
        return loss, jnp.sum(weights * p) / len(tokens)

    (loss, p), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(lora)
    odd = float((tokens % 2 * batch["weights"]).sum() / batch["weights"].sum())
    return {"loss": float(loss), "p": float(p), "odd": odd}, tiny.arrays(grads)


@pytest.mark.parametrize(
    ("shape", "streamed", "sums_on_host"),
    [
        ((4,), False, False),
        ((2, 2), False, False),
        ((2, 2), False, True),
        ((2, 2), True, False),
    ],
    ids=["one batch", "micro-batches", "sums on the host", "streamed"],
)
def test_a_step_of_ones_own_objective_is_the_plain_computation(
    parts, batch, by_rows, wanted, shape, streamed, sums_on_host
):
    graphdef, lora, base = parts
    base = qlora.stream(base) if streamed else base
    step = make_train_step(
        graphdef, optax.sgd(1.0), objective=by_rows, sums_on_host=sums_on_host
    )
    copy = jax.tree.map(jnp.copy, lora)
    given = {name: x.reshape(*shape, -1) for name, x in batch.items()}
    after, _, metrics = step(copy, base, optax.sgd(1.0).init(copy), given)
    figures, grads = wanted
    assert float(metrics["tokens"]) == batch["weights"][:, 1:].sum()
    for name, value in figures.items():
        assert float(metrics[name]) == pytest.approx(value, rel=SUM_ORDER), name
    moved = tiny.arrays(jax.tree.map(lambda a, b: a - b, lora, after))
    for have, want in zip(moved, grads, strict=True):
        atol = 1e-4 * np.abs(want).max()
        assert atol > 0
        np.testing.assert_allclose(have, want, atol=atol, rtol=0)


def test_streamed_micro_batches_share_each_layers_copy(parts, batch, by_rows):
    graphdef, lora, base = parts
    base, seen = qlora.stream(base), []

    def loss(model: Any, batch: Any, *rest: Any) -> Any:
        seen.append(batch["tokens"].shape)
        return by_rows.loss(model, batch, *rest)

    given = {name: x.reshape(2, 2, -1) for name, x in batch.items()}
    for together in (True, False):
        one = Objective(name="seen", loss=loss, takes_micro_axis=together)
        step = make_train_step(graphdef, optax.sgd(1.0), objective=one)
        jax.eval_shape(step, lora, base, optax.sgd(1.0).init(lora), given)
    assert seen == [(2, 2, 12), (2, 12)]


def test_the_evaluation_of_an_objective_sums_and_counts(parts, batch, by_rows, wanted):
    graphdef, lora, base = parts
    loss, rows, _ = make_eval_step(graphdef, objective=by_rows)(lora, base, batch)
    assert rows == len(LENGTHS)
    assert float(loss / rows) == pytest.approx(wanted[0]["loss"], rel=SUM_ORDER)


def returning(loss: Any, metrics: Any = None, **more: Any) -> Objective:
    def of(*_: Any) -> tuple:
        return loss if metrics is None else (loss, metrics)

    return Objective(name="mine", loss=of, **more)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (returning(1.0, {"tokens": 1.0, "step": 2.0}), "(?s)2 problems.*tokens.*step"),
        (
            returning(1.0, {"hits": jnp.ones(3)}),
            r"hits is an array of shape \(3,\), exp",
        ),
        (returning(1.0, {"hits": (1, 2, 3)}), "hits is tuple, expected a scalar"),
        (returning(1.0, {"hits": None}), "hits is NoneType, expected a scalar"),
        (returning(jnp.ones(2), {}), r"the loss is an array of shape \(2,\), expected"),
        (returning(jnp.float32(1)), "it returned .*expected a pair"),
        (returning((1.0, [2.0])), "it returned tuple, expected a pair: .* a dict"),
        (returning(1.0, {}, needs=("rewards",)), "needs rewards in a batch, which has"),
    ],
)
def test_an_objective_that_a_step_cannot_use_is_refused(objective, message):
    batch = {"tokens": jnp.ones((1, 2)), "weights": jnp.ones((1, 2))}
    with pytest.raises(ConfigError, match=message):
        objective(None, batch)


def test_a_step_minimizes_one_thing(parts, by_rows, caplog):
    def loss_fn(model: Any, batch: Any, key: Any) -> Any:
        return jnp.float32(0)

    with pytest.raises(ConfigError, match="a loss_fn and the objective focal by rows"):
        make_train_step(parts[0], optax.sgd(1), loss_fn=loss_fn, objective=by_rows)
    make_train_step(parts[0], optax.sgd(1), loss_fn=loss_fn, checkpoint="layer")
    assert "checkpoint='layer' does not reach a loss_fn" in caplog.text


def test_objectives_are_found_by_name(focal):
    def find_objective(name: str) -> Objective:
        return make_objective(ObjectiveConfig(name=name))

    assert find_objective("sft").name == "sft"
    assert find_objective("focal:FOCAL") is focal.FOCAL
    for name, message in (
        ("dop", "--objective is 'dop', expected sft.*or package.module:name"),
        ("focal:", "'focal:', expected"),
        ("nowhere_at_all:A", "ModuleNotFoundError: No module.*PYTHONPATH"),
        ("broken:A", "importing broken failed.*nowhere_to_be_found"),
        ("focal:focal", "focal has no focal; its objectives are FOCAL"),
        ("focal:loss", "is of type function, expected an Objective.*FOCAL"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_objective(name)


def test_a_trainer_reports_an_objectives_metrics_and_resumes_with_it(focal, tmp_path):
    config = TrainConfig(
        max_steps=4,
        micro_batch=2,
        grad_accum=2,
        save_every=2,
        compute_dtype="float32",
        learning_rate=5e-3,
    )

    def trainer(folder: str, **more: Any) -> Trainer:
        model = tiny.adapted(tiny.quantized(), targets="q_proj", zero=True)
        out = tmp_path / folder
        more = {"objective": focal.FOCAL, **more}
        return Trainer(model, tiny.rows(LENGTHS), config, out, evaluation=held, **more)

    def rows(folder: str) -> list[tuple]:
        wanted = ("step", "loss", "p", "eval_loss")
        lines = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [tuple(line.get(name) for name in wanted) for line in lines]

    held = tiny.rows([8, 8], seed=1)
    whole = trainer("whole")
    whole.fit()
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    taken = [line for line in lines if "loss" in line]
    assert [0 < line["p"] < 1 for line in taken] == 4 * [True]
    assert set().union(*lines) - {"p", "eval_p"} <= RESERVED

    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
    with pytest.raises(CheckpointError, match="objective: it has 'focal', .* 'sft'"):
        trainer("parts", objective=None).fit(resume=True)
    resumed = trainer("parts")
    resumed.fit(resume=True)
    assert resumed.start == 2
    assert rows("parts") == rows("whole")
    # What evaluation measures is the objective too: here by numpy, of all logits.
    (batch,) = held.every(2, "off")
    logits = tiny.logits(whole.model, jnp.asarray(batch["tokens"]))[:, :-1].astype(
        np.float64
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = np.take_along_axis(p, batch["tokens"][:, 1:, None], axis=2)[..., 0]
    weights = batch["weights"][:, 1:]
    wanted = -(weights * (1 - p) * np.log(p)).sum() / weights.sum()
    assert lines[-1]["eval_loss"] == pytest.approx(wanted, rel=SUM_ORDER)
    mean = (weights * p).sum() / weights.sum()
    assert lines[-1]["eval_p"] == pytest.approx(mean, rel=SUM_ORDER)


def test_the_command_takes_an_objective_by_its_name(focal, tmp_path, capsys):
    base = tiny.write_folder(tmp_path / "base")
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sums(6))
    out = tmp_path / "run"
    args = ["--model", base, "--data", data, "--out", out, "--lora.targets", "q_proj"]
    args += ["--train.micro-batch", 2, "--train.grad-accum", 1, "--train.max-steps", 2]
    args += ["--objective", "focal:FOCAL", "--train.compute-dtype", "float32"]
    assert main(["train", *map(str, args)]) == 0
    assert re.search(r"step 2/2: loss \d.*  p 0\.\d", capsys.readouterr().err)
    assert [0 < row["p"] < 1 for row in read_metrics(out / "metrics.jsonl")] == 2 * [1]
    config = out / "config.toml"
    text = config.read_text()
    assert 'name = "focal:FOCAL"' in text
    # A run goes on with what it was begun with, or not at all.
    for other, message in (
        ("sft", "--objective.name is sft, it was focal:FOCAL"),
        ("focal:BLURRY", "--objective.name is focal:BLURRY, it was focal:FOCAL"),
    ):
        config.write_text(text.replace("focal:FOCAL", other))
        assert main(["train", "--resume", str(out)]) == 2
        assert message in capsys.readouterr().err


def as_older_versions_wrote(path: Path, config: Any) -> None:
    """Writes a run's settings with its objective among those of training."""
    write_toml(path, config)
    values = read_toml(path)
    values["train"]["objective"] = values.pop("objective")["name"]
    unset = list(_nones(values, ""))
    path.write_text(tomli_w.dumps({"unset": unset, **_without_none(values)}))


def test_a_run_that_an_older_version_began_goes_on(focal, tmp_path, monkeypatch):
    base = tiny.write_folder(tmp_path / "base")
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sums(6))
    out = tmp_path / "run"
    args = ["--model", base, "--data", data, "--out", out, "--lora.targets", "q_proj"]
    args += ["--train.micro-batch", 2, "--train.grad-accum", 1, "--train.max-steps", 2]
    args += ["--objective=focal:FOCAL", "--train.compute-dtype", "float32"]
    with monkeypatch.context() as patch:
        patch.setattr(begin, "write_toml", as_older_versions_wrote)
        assert main(["train", *map(str, args)]) == 0
    for file in (out / FILE, out / "checkpoints" / "2" / FILE):
        assert "[objective]" not in file.read_text()
    assert main(["train", "--resume", str(out), "--train.max-steps", "3"]) == 0
    assert read_run(out).objective == ObjectiveConfig(name="focal:FOCAL")
    assert main(["train", "--resume", str(out), "--train.max-steps", "4"]) == 0
