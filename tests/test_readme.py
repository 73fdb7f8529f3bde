"""Every command of the README runs, and its Python example does."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from scripts.make import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [
        line.partition("#")[0].strip() for b in blocks("sh") for line in b.splitlines()
    ]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository to a command run in it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "qlora_jax").mkdir()
    (folder / "qlora_jax" / "assets").symlink_to(ROOT / "qlora_jax" / "assets")
    return folder


def test_the_two_commands_are_the_scripts():
    first = [line for line in commands() if line.startswith("scripts/")]
    assert first == ["scripts/quickstart", "scripts/test"]
    for line in first:
        assert os.access(ROOT / line, os.X_OK)


@pytest.mark.slow
def test_quickstart_script_runs(tmp_path: Path):
    # Few steps; the whole of it is what CI's author and every reader run.
    out = subprocess.run(
        [ROOT / "scripts/quickstart", "--max-steps", "2", "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert out.returncode == 0, out.stderr
    figures = json.loads(out.stdout.splitlines()[-1])
    assert figures["steps"] == 2
    assert figures["exact_match_before"] < 0.05
    for name in ("loss.png", "report.html", "metrics.jsonl", "adapter/adapter.json"):
        assert (tmp_path / "run" / name).exists(), name


@pytest.mark.slow
def test_every_qlora_command_runs_in_the_order_given(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from qlora_jax.cli.main import main

    monkeypatch.chdir(clone)
    lines = [line for line in commands() if line.startswith("qlora ")]
    assert len(lines) >= 7
    for line in lines:
        args = shlex.split(line)[1:]
        # The same command on less: the README's own numbers are for a reader's machine.
        if args[0] == "train" and "--resume" not in args:
            args += ["--train.micro-batch", "8", "--train.grad-accum", "1"]
            args[args.index("--train.max-steps") + 1] = "2"
        if args[0] == "generate":
            args += ["--max-new-tokens", "4"]
        status = main(args)
        captured = capsys.readouterr()
        assert status == 0, f"{line}: {captured.err}"
        json.loads(captured.out.splitlines()[-1])


@pytest.mark.slow
def test_python_examples_run(clone: Path, monkeypatch: pytest.MonkeyPatch):
    example, several = (
        block.replace("path/or/hub-id", str(ROOT / "qlora_jax/assets/base"))
        for block in blocks("python")
    )
    monkeypatch.chdir(clone)
    rows = (ROOT / "qlora_jax/assets/train.jsonl").read_text().splitlines()[:16]
    (clone / "train.jsonl").write_text("\n".join(rows) + "\n")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["merged"].compute_dtype.name == "bfloat16"
    assert (clone / "adapter" / "adapter.json").exists()
    exec(compile(several, "README.md", "exec"), names)
    assert len(names["new"]) == 3 and names["bank"].adapters == ("a", "half")


def test_the_table_of_families_is_that_of_the_registry():
    assert tables.written(README) == README
    assert tables.families() in README
