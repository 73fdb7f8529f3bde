"""Stopping and resuming by the command: what is safe, what may change, what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from command import call, refused

from qlora_jax import digests
from qlora_jax.cli import stopping, train
from qlora_jax.cli.main import main
from qlora_jax.cli.progress import TrainProgress
from qlora_jax.cli.resume import check_changes, other_end
from qlora_jax.config.run import read_run
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.find import find_adapter
from qlora_jax.exchange.read import read_adapter
from qlora_jax.exchange.steps import read_position
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.clock import stopped_at
from qlora_jax.train.lock import locked
from qlora_jax.train.loop import Trainer
from qlora_jax.train.metrics import MetricsLog, read_metrics

FLAGS = ["--train.micro-batch", "2", "--train.grad-accum", "1", "--lora.rank", "2"]
FLAGS += ["--train.compute-dtype", "float32", "--data.max-tokens", "64"]
FLAGS += [
    "--data.eval-rows",
    "2",
    "--train.eval-every",
    "2",
    "--lora.targets",
    "q_proj",
]
STEPS = ["--train.max-steps", "4", "--train.save-every", "2"]


class Folders:
    """A base, rows, and a whole run of four steps."""

    def __init__(self, root: Path):
        self.base = tiny.write_folder(root / "base")
        self.rows = tiny.write_jsonl(root / "rows.jsonl", tiny.sums(12))
        self.run = root / "run"
        assert main(self.args(self.run)) == 0

    def args(self, out: Path, *more: object) -> list[str]:
        args = ["train", "--model", self.base, "--data", self.rows, "--out", out]
        return [str(arg) for arg in (*args, *FLAGS, *STEPS, *more)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def run(folders: Folders, tmp_path: Path) -> Path:
    """A copy of the run, as it was after step 2."""
    out = shutil.copytree(folders.run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "4")
    return out


def measured(run: Path) -> list[tuple]:
    wanted = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        tuple(row.get(name) for name in wanted)
        for row in read_metrics(run / "metrics.jsonl")
    ]


def arrays(run: Path) -> dict[str, str]:
    """Digests of the adapter's arrays."""
    return json.loads((run / "adapter" / "adapter.json").read_text())["sha256"]


def test_more_steps_and_another_cadence_go_on_and_say_what_that_means(
    folders: Folders, run: Path, tmp_path: Path, capsys
):
    more = [
        "--train.max-steps",
        6,
        "--train.save-every",
        3,
        "--train.keep-checkpoints",
        3,
    ]
    assert main(["train", "--resume", str(run), *map(str, more)]) == 0
    out, err = capsys.readouterr()
    assert "--train.max-steps is 6, it was 4: the run ends at another step" in err
    assert "the run ends at step 6, not 4; the learning rate of no step up to 4" in err
    assert (
        "--train.save-every is 3, it was 2: no loss and no weight depends on it" in err
    )
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 6 and figures["tokens"] > 0
    assert read_run(run).train.max_steps == 6
    assert measured(run)[: len(measured(folders.run)) - 1] == measured(folders.run)[:-1]
    whole = tmp_path / "whole"
    args = folders.args(whole, "--train.max-steps", 6)
    assert main(args) == 0
    assert measured(whole) == measured(run) and arrays(whole) == arrays(run)


def test_an_end_that_moves_the_schedule_is_said():
    def of_epochs(epochs: float) -> int:
        raise AssertionError(f"{epochs} epochs are not asked for")

    config = TrainConfig(max_steps=100, schedule="linear")
    later = dataclasses.replace(config, max_steps=200)
    said = other_end(config, later, of_epochs, start=40)
    assert said is not None and "step 41 has a learning rate of 0.0001" in said
    assert "bit-equal to no run" in said
    config, later = (
        dataclasses.replace(x, schedule="constant") for x in (config, later)
    )
    said = other_end(config, later, of_epochs, start=40)
    assert said is not None and "the learning rate of no step up to 100 changes" in said
    # The rise from 0 is a part of all steps, so it is another one.
    assert "step 1 has a learning rate" in str(
        other_end(config, later, of_epochs, start=0)
    )
    assert other_end(config, dataclasses.replace(config, seed=1), of_epochs, 40) is None
    with pytest.raises(ConfigError, match="would end at step 100, .* step 150"):
        other_end(later, config, of_epochs, start=150)


def test_micro_batches_of_the_same_rows_may_change(run: Path):
    before = read_run(run)
    train = dataclasses.replace(before.train, micro_batch=1, grad_accum=2, offload=True)
    said = check_changes(run, before, dataclasses.replace(before, train=train))
    assert len(said) == 3
    assert all("may differ in rounding and are not bit-equal" in line for line in said)
    lora = dataclasses.replace(before.lora, dropout=0.1)
    dropped = dataclasses.replace(before, lora=lora)
    said = check_changes(run, dropped, dataclasses.replace(dropped, train=train))
    assert sum("dropout is drawn for each micro-batch" in line for line in said) == 2


def test_settings_that_make_another_run_are_refused_by_name(run: Path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error = refused(
        *(capsys, "train", "--resume", run, "--train.learning-rate", 1),
        *("--train.schedule", "cosine", "--train.seed", 1, "--train.max-grad-norm", 1),
        *("--lora.rank", 4, "--data.max-tokens", 32, "--train.micro-batch", 4),
        *("--quant.codebook", "fp4", "--train.save-every", 1),
    )
    assert "another run; start one with --out (8 problems)" in error
    for name in ("train.learning-rate is 1.0, it was 0.0002", "train.schedule", "seed"):
        assert name in error
    for name in ("max-grad-norm", "lora.rank", "data.max-tokens", "quant.codebook"):
        assert name in error
    assert "micro-batch times grad-accum is 4 rows a step, it was 2" in error
    assert before == {path: path.read_bytes() for path in before}


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Python's own handler of Ctrl-C, also where a shell has started the tests in the
    background, and so with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def scaled(base: Path) -> None:
    """Multiplies one value of a weight."""
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (base / digests.NAME).unlink()  # else it is known for damage before


def edited(rows: Path) -> None:
    text = rows.read_text()
    rows.write_text(text.replace("after", "behind"))


def test_another_base_or_other_rows_in_the_same_place_are_refused(
    folders: Folders, run: Path, tmp_path: Path, capsys
):
    base = shutil.copytree(folders.base, tmp_path / "base")
    rows = Path(shutil.copy(folders.rows, tmp_path / "rows.jsonl"))
    moved = ["train", "--resume", run, "--model", base, "--data", rows]
    scaled(base)
    error = refused(capsys, *moved)
    assert "another run (1 problem)" in error
    assert "base.weights: the base's weights are not what it has trained" in error
    shutil.copytree(folders.base, base, dirs_exist_ok=True)
    edited(rows)
    error = refused(capsys, *moved)
    assert "another run (2 problems)" in error
    assert " data: the rows" in error and "eval_data: the held-out rows" in error
    shutil.copy(folders.rows, rows)
    template = base / "tokenizer_config.json"
    template.write_text(template.read_text().replace("<{{", "<|{{"))
    assert "base.tokenizer: the base's tokenizer is not" in refused(capsys, *moved)
    shutil.copytree(folders.base, base, dirs_exist_ok=True)
    # What only moved goes on.
    call(capsys, *moved)
    assert measured(run) == measured(folders.run) and arrays(run) == arrays(folders.run)
    assert read_run(run).model == str(base)


@pytest.mark.filterwarnings("ignore:Error writing persistent")  # compiled programs
def test_no_room_leaves_the_last_checkpoint_whole_and_the_rest_bit_equal(
    folders: Folders, run: Path, capsys
):
    metrics = (run / "checkpoints" / "2" / "metrics.jsonl").stat().st_size
    for limit, said in (
        (metrics + 20, "metrics.jsonl cannot be written: File too large"),
        (metrics + 5000, "checkpoint 4 could not be written"),
    ):
        with tiny.file_limit(limit):
            assert main(["train", "--resume", str(run)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error
        verified = call(capsys, "inspect", "--verify", run)
        assert verified["files"] > 10 and not (run / "run.lock").exists()
    call(capsys, "train", "--resume", run)
    assert measured(run) == measured(folders.run) and arrays(run) == arrays(folders.run)


def test_a_config_that_was_cut_is_noticed(run: Path, capsys):
    path, text = run / "config.toml", (run / "config.toml").read_text()
    path.write_text(text[: text.index("[data]")])
    error = refused(capsys, "train", "--resume", run)
    assert "lacks settings that the run had" in error and "data.max_tokens" in error
    assert f"copy it to {path}" in error
    path.write_text(text[:-30])
    assert f"copy it to {path}" in refused(capsys, "train", "--resume", run)
    shutil.copy(run / "checkpoints" / "2" / "config.toml", path)
    assert path.read_text() == text


def test_a_run_that_is_there_says_how_to_go_on(folders: Folders, run: Path, capsys):
    error = refused(capsys, *folders.args(run))
    assert "unfinished run, of which step 2 of 4 is saved" in error
    assert f"qlora train --resume {run}" in error
    error = refused(capsys, *folders.args(folders.run))
    assert "finished run of 4 steps" in error and "--train.max-steps N" in error


HOLD = """
import sys, time
from pathlib import Path
from qlora_jax.exchange.steps import read_position
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.clock import stopped_at
from qlora_jax.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_stale_lock_taken_over(run, caplog, capsys):
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        error = refused(capsys, "train", "--resume", run)
        assert f"is being trained by process {child.pid} on " in error
        child.kill()
    assert (run / "run.lock").exists()
    with locked(run), locked(run):  # a process may take its own again
        assert f"the lock of process {child.pid} on " in caplog.text
        assert "is stale" in caplog.text
    assert not (run / "run.lock").exists()


def test_ctrl_c_finishes_the_step_and_resuming_is_exact(
    folders: Folders, tmp_path: Path, capsys, monkeypatch, caplog
):
    out, show = tmp_path / "run", TrainProgress.__call__

    def shown(self: TrainProgress, metrics: dict) -> None:
        show(self, metrics)
        # Step 3 is under way then.
        if metrics["step"] == 2 and "loss" in metrics:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "__call__", shown)
    assert main(folders.args(out)) == 130
    said, err = capsys.readouterr()
    figures = json.loads(said.splitlines()[-1])
    assert figures["steps"] == 3 and figures["finished"] is False
    assert (
        f"stopped after step 3 of 4, which is saved; to go on: qlora train --resume {out}"
        in err
    )
    assert (out / "report.html").exists() and arrays(out)
    assert not (out / "run.lock").exists()
    monkeypatch.setattr(TrainProgress, "__call__", show)
    (out / "metrics.jsonl").unlink()  # which the checkpoint has too
    figures = call(capsys, "train", "--resume", out)
    assert "metrics.jsonl is lost" in caplog.text
    assert figures["steps"] == 4 and "finished" not in figures
    rows = read_metrics(folders.run / "metrics.jsonl")
    assert figures["tokens"] == sum(row.get("tokens", 0) for row in rows)
    assert measured(out) == measured(folders.run) and arrays(out) == arrays(folders.run)


def test_a_signal_during_the_first_evaluation_loses_nothing(
    folders: Folders, tmp_path: Path, capsys, monkeypatch
):
    out, begun = tmp_path / "run", Trainer._begun

    def signalled(self: Trainer, resume: bool) -> MetricsLog:
        signal.raise_signal(signal.SIGTERM)
        return begun(self, resume)

    monkeypatch.setattr(Trainer, "_begun", signalled)
    assert main(folders.args(out)) == 143
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0"]
    monkeypatch.setattr(Trainer, "_begun", begun)
    call(capsys, "train", "--resume", out)
    assert measured(out) == measured(folders.run) and arrays(out) == arrays(folders.run)


def test_any_checkpoint_is_an_adapter(folders: Folders, run: Path, caplog, capsys):
    assert find_adapter(folders.run) == folders.run / "adapter"
    assert "unfinished" not in caplog.text
    checkpoint = run / "checkpoints" / "2"
    for _ in range(2):
        assert find_adapter(run) == checkpoint
    assert caplog.text.count(f"{run} is unfinished: its checkpoint 2 of 4 steps") == 1
    assert find_adapter(f"{run}@2") == find_adapter(checkpoint) == checkpoint
    assert find_adapter(f"{folders.run}@best") == folders.run / "checkpoints" / "4"
    last, after_2 = (read_adapter(path).lora for path in (folders.run, f"{run}@2"))
    pairs = zip(tiny.arrays(last), tiny.arrays(after_2), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)
    # The base is held as the run held it.
    args = ["evaluate", "--model", folders.base, "--adapter", f"{run}@2"]
    said = call(capsys, *args, "--data", folders.rows, "--data.max-tokens", 64)
    assert said["base"].startswith("nf4")
    assert call(capsys, "inspect", f"{run}@2")["kind"] == "adapter"
    losses = {str(row[0]): row[-1] for row in measured(folders.run) if row[-1]}
    said = call(capsys, "inspect", folders.run)
    assert said["checkpoints"] == {step: losses[step] for step in ("2", "4")}
    assert (said["best_checkpoint"], said["best_eval_loss"]) == (4, losses["4"])
    assert "has no checkpoint 3; it has 2" in refused(capsys, "inspect", f"{run}@3")
    (checkpoint / "adapter" / "manifest.ocdbt").write_bytes(b"")
    error = refused(capsys, "inspect", f"{run}@2")
    assert "adapter/manifest.ocdbt is not as it was written: 0 bytes" in error


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.05, 0.4])
def test_ctrl_c_while_importing_is_one_word(after: float):
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora_jax.cli.main", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    handled = Path(f"/proc/{child.pid}/status")
    while signal_mask(handled) == 0:  # Python's own handler, then ours
        time.sleep(0.002)
    time.sleep(after)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err, out) == (143, "terminated\n", "")


def signal_mask(status: Path) -> int:
    """Returns whether SIGTERM is caught, which Python's start alone does not do."""
    for line in status.read_text().splitlines():
        if line.startswith("SigCgt:"):
            return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1
    return 0


def test_templates_write_the_time_at_which_a_run_was_begun(run: Path, monkeypatch):
    position = read_position(run / "checkpoints" / "2")
    args = train.parse(["--resume", str(run)], "qlora train")
    assert args.begun == position["begun"]
    template = ChatTemplate("{{ strftime_now('%Y') }}")
    with stopped_at("1999-12-31T23:59:59"), stopped_at("1998-01-01"):
        assert template.render([{"role": "user", "content": "x"}]) == "1998"
    assert "QLORA_JAX_NOW" not in os.environ


def test_handlers_are_put_back():
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--version"]) == 0
    assert before == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert stopping.status() == 0
