"""The command: every subcommand end to end, and every refusal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from qlora_jax.adapters import merge as merge_adapter
from qlora_jax.cli.main import main
from qlora_jax.config.quant import QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.ours import load_adapter
from qlora_jax.sources.load import load
from qlora_jax.sources.save import save_model
from qlora_jax.toml import from_dict
from qlora_jax.train.metrics import read_metrics

FAST = ["--train.micro-batch", "2", "--train.grad-accum", "1", "--lora.rank", "2"]
FAST += ["--train.compute-dtype", "float32", "--data.max-tokens", "64"]
TRAIN = ["train", "--model", "{base}", "--data", "{rows}", "--out", "{tmp}/o"]
EVALUATE = ["evaluate", "--model", "{base}", "--data", "{rows}"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(
        tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.sums(12)
    )


@pytest.fixture(scope="session")
def run_folder(
    base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    args = ["--model", str(base), "--data", str(rows), "--out", str(out)]
    args += ["--train.max-steps", "3", "--data.eval-rows", "2", *FAST]
    assert main(["train", *args]) == 0
    return out


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict, str]:
    """Runs a command; returns its status, last line and stderr."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return status, json.loads(lines[-1]) if lines and status == 0 else {}, captured.err


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command that must fail as wrong input; returns the message."""
    try:
        status, _, error = call(capsys, *args)
    except SystemExit as stop:  # tyro's own, for flags it cannot parse
        status, error = stop.code, capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    return error


def test_train_writes_a_whole_run_folder(run_folder: Path):
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "config.toml",
        "loss.png",
        "metrics.jsonl",
        "report.html",
    }
    steps = [row for row in read_metrics(run_folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    wanted = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_s"}
    assert wanted <= steps[0].keys()


def test_quantize_then_evaluate_train_and_generate(
    base: Path, rows: Path, tmp_path: Path, capsys
):
    status, said, _ = call(capsys, "quantize", "--model", base, "--out", tmp_path / "q")
    assert status == 0 and said["base"].startswith("nf4, block 64, double-quantized")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 8)
    evaluate = ["evaluate", "--data", text, "--window", 16, "--dtype", "float32"]
    _, stored, _ = call(capsys, *evaluate, "--model", tmp_path / "q")
    _, now, _ = call(capsys, *evaluate, "--model", base, "--quant.codebook", "nf4")
    _, dense, _ = call(capsys, *evaluate, "--model", base)
    # bfloat16 embeddings in the stored copy; the linears are the same.
    assert stored["perplexity"] == pytest.approx(now["perplexity"], rel=2e-2)
    assert dense["perplexity"] != now["perplexity"] and dense["base"] == "dense"
    status, said, _ = call(
        capsys, "generate", "--model", tmp_path / "q", "--prompt", "ab", "c",
        "--max-new-tokens", 3,
    )  # fmt: skip
    assert status == 0 and len(said["texts"]) == 2


INT8 = ("--quant.embedding", "int8", "--quant.head", "int8")


def quantized(base: Path, out: Path, capsys) -> str:
    args = ["quantize", "--model", base, "--out", out, "--dtype", "float32", *INT8]
    status, _, err = call(capsys, *args)
    assert status == 0, err
    return err


def test_quantize_stores_int8_tables_and_no_4_bit_ones(
    base: Path, tmp_path: Path, capsys
):
    said = quantized(base, tmp_path / "q", capsys)
    assert "int8 tables open in qlora_jax alone" in said
    status, said, _ = call(capsys, "inspect", tmp_path / "q")
    assert status == 0
    # 8 bits a weight, and a float32 scale a row.
    for part in ("embedding", "head"):
        assert said["bytes_by_part"][part] == 272 * (64 + 4)
    args = ["quantize", "--model", base, "--out", tmp_path / "r", "--quant.head"]
    assert "no folder holds such tables" in refused(capsys, *args, "4bit")


@pytest.mark.slow
def test_stored_int8_tables_train_as_those_made_on_load(
    base: Path, rows: Path, tmp_path: Path, capsys
):
    quantized(base, tmp_path / "q", capsys)
    losses = []
    for model, tables in ((tmp_path / "q", ()), (base, INT8)):
        out = tmp_path / f"run{len(losses)}"
        args = ["train", "--model", model, "--data", rows, "--out", out, *tables, *FAST]
        status, said, err = call(capsys, *args, "--train.max-steps", 2)
        assert status == 0, err
        trained = said["loss"]
        # A run's own tables, unless the folder has them.
        args = ["evaluate", "--model", model, "--adapter", out, "--data", rows]
        status, said, _ = call(capsys, *args, "--dtype", "float32")
        losses.append((trained, said["loss"]))
    assert losses[0] == losses[1]
    args = ["merge", "--model", tmp_path / "q", "--adapter", tmp_path / "run0"]
    status, said, _ = call(capsys, *args, "--out", tmp_path / "merged")
    assert status == 0 and said["merged_onto"].startswith("dequantized nf4")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_values_that_a_setting_cannot_have_are_named_with_those_it_can():
    wrong = {"embedding": "nf4", "double_quant": "4bit"}
    with pytest.raises(ConfigError, match="'none' or '4bit' or 'int8'"):
        from_dict(QuantOptions, wrong, "config.toml")


@pytest.mark.slow
def test_evaluate_with_an_adapter_holds_the_base_as_its_run_did(
    base: Path, rows: Path, run_folder: Path, tmp_path: Path, capsys
):
    args = ["evaluate", "--model", base, "--adapter", run_folder, "--data", rows]
    args += ["--data.max-tokens", 64, "--exact-match", "--max-new-tokens", 3]
    status, said, _ = call(capsys, *args, "--predictions", tmp_path / "p.jsonl")
    assert status == 0 and said["base"].startswith("nf4")
    assert said["rows"] == 12 and 0 <= said["exact_match"] <= 1
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 12
    again = refused(capsys, *args, "--predictions", tmp_path / "p.jsonl")
    assert "p.jsonl is a file already" in again


@pytest.mark.parametrize(
    ("codebook", "said"),
    [("none", "original weights"), ("nf4", "dequantized nf4 weights")],
)
def test_merge_says_what_it_merged_onto(
    base: Path, run_folder: Path, tmp_path: Path, capsys, codebook: str, said: str
):
    out = tmp_path / "merged"
    args = ["merge", "--model", base, "--adapter", run_folder, "--out", out]
    status, figures, _ = call(capsys, *args, "--quant.codebook", codebook)
    assert status == 0 and figures["merged_onto"].startswith(said)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "is not empty" in refused(capsys, *args)


def test_doctor_says_what_runs(capsys):
    status, said, _ = call(capsys, "doctor")
    assert status == 0 and said["platform"] == "cpu"
    for product in ("forward 1", "backward 2048"):
        assert said["nf4_matmul"][product]["implementation"] == "xla"


def test_a_taken_out_is_refused_and_overwriting_keeps_foreign_files(
    base: Path, rows: Path, run_folder: Path, tmp_path: Path, capsys
):
    out = tmp_path / "b"
    shutil.copytree(run_folder, out)
    (out / "mine.txt").write_text("mine")
    before = (out / "metrics.jsonl").read_text()
    args = ["train", "--model", base, "--data", rows, "--out", out, *FAST]
    assert "pass --overwrite" in refused(capsys, *args)
    assert (out / "metrics.jsonl").read_text() == before
    status, said, _ = call(capsys, *args, "--overwrite", "--train.max-steps", 1)
    assert status == 0 and said["steps"] == 1
    assert (out / "mine.txt").read_text() == "mine"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["1"]


@pytest.mark.slow
def test_a_config_file_gives_defaults_that_flags_replace(
    base: Path, rows: Path, tmp_path: Path, capsys
):
    config = tmp_path / "c.toml"
    config.write_text("[lora]\nrank = 3\nalpha = 6\n[train]\nmax_steps = 1\n")
    args = ["train", "--config", config, "--model", base, "--data", rows]
    status, _, _ = call(capsys, *args, "--out", tmp_path / "r", *FAST[:4], *FAST[6:])
    assert status == 0
    stored = (tmp_path / "r" / "config.toml").read_text()
    assert "rank = 3" in stored and "max_steps = 1" in stored
    config.write_text('[lora]\nrnk = 3\n[train]\nmax_steps = "x"\nsped = 1\n')
    error = refused(capsys, *args, "--out", tmp_path / "s")
    assert "3 problems" in error and "did you mean rank?" in error
    assert "train.max_steps is 'x'" in error and not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(
    base: Path, rows: Path, tmp_path: Path
):
    flags = ["--model", str(base), "--data", str(rows), "--train.max-steps", "40"]
    flags += ["--train.save-every", "4", "--lora.dropout", "0.1", *FAST]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *flags, "--out", str(whole)]) == 0
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora_jax.cli.main", "train", *flags, "--out", killed],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
    )
    deadline = time.monotonic() + 300
    while len(read_metrics(killed / "metrics.jsonl")) < 10:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert main(["train", "--resume", str(killed)]) == 0
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 41))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "no subcommand 'nonsense'"),
        (["train", "--data", "{rows}", "--out", "o"], "--model missing"),
        (["train", "--resume", "{tmp}/none"], "config.toml does not exist"),
        (["train", "--resume", "{run}", "--lora.rank", "3"], "lora.rank is 3, it was 2"),
        (["train", "--resume", "{run}", "--out", "o"], "--out: does not go with --resume"),
        (["evaluate", "--model", "{tmp}/none", "--data", "{rows}"], "is no folder"),
        (["evaluate", "--model", "{tmp}", "--data", "{rows}"], "has no config.json"),
        (["evaluate", "--model", "{base}", "--data", "{tmp}/x"], "is no file"),
        (
            ["evaluate", "--model", "{base}", "--data", "{rows}", "--adapter", "{tmp}"],
            "holds no adapter",
        ),
        (
            ["generate", "--model", "{base}", "--prompt", "a", "--top-p", "2"],
            "--top-p is 2.0",
        ),
        (
            ["quantize", "--model", "{base}", "--out", "{run}"],
            "exists and is not empty",
        ),
        (
            ["quantize", "--model", "{base}", "--out", "o", "--quant.block-size", "48"],
            "--quant.block-size is 48, expected a power of two",
        ),
        (
            ["train", "--model", "{base}", "--data", "{rows}", "--out", "{tmp}/o",
             "--lora.targets", "q_prj"],
            "near: q_proj",
        ),
        (
            ["train", "--model", "{base}", "--data", "{rows}", "--out", "{tmp}/o",
             "--data.max-tokens", "8"],
            "12 of 12 rows of ",
        ),
        (["train", "--lora.rank", "x"], "rank"),
        ([*TRAIN, "--lora.rank", "0", "--lora.dropout", "2"], "--lora.rank is 0"),
        ([*TRAIN, "--train.seed", "-1"], "--train.seed is -1"),
        ([*TRAIN, "--objective", "dop"], "--objective is 'dop', expected sft"),
        ([*TRAIN, "--train.objective", "dpo"], "--train.objective is --objective now"),
        ([*TRAIN, "--train.micro-bach", "2"], "--train.micro-batch"),
        ([*TRAIN, "--train.schedule", "cosin"], "cosine"),
        ([*TRAIN, "--data.eval-rows", "12"], "--data.eval-rows 12 leaves nothing"),
        ([*TRAIN, "--eval-data", "{tmp}/none.jsonl"], "none.jsonl is no file"),
        ([*TRAIN, "--config", "{tmp}/none.toml"], "none.toml does not exist"),
        ([*TRAIN, "--config", "{rows}"], "rows.jsonl is not TOML"),
        (["evaluate", "--model", "{base}"], "data"),
        ([*EVALUATE, "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        ([*EVALUATE, "--dtype", "int8"], "dtype is 'int8'"),
        ([*EVALUATE, "--exact-match", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (
            [*EVALUATE, "--exact-match", "--predictions", "{tmp}/none/p.jsonl"],
            "none is no folder",
        ),
        (
            ["evaluate", "--model", "{base}", "--data", "{text}", "--window", "0"],
            "--window is 0, expected at least 1",
        ),
        (
            ["evaluate", "--model", "{base}", "--data", "{base}/model.safetensors"],
            "model.safetensors is not UTF-8 text",
        ),
        (["evaluate", "--model", "{base}", "--data", "{text}", "--max-chars", "0"],
         "no token to predict"),
        (["quantize", "--model", "{base}", "--out", "{tmp}/o", "--quant.codebook", "none"],
         "--quant.codebook"),
        (["merge", "--model", "{base}", "--adapter", "{run}", "--out", "{rows}"],
         "rows.jsonl is a file"),
        (["merge", "--model", "{base}", "--adapter", "{tmp}", "--out", "{tmp}/o"],
         "holds no adapter"),
    ],
)  # fmt: skip
def test_wrong_input_ends_with_one_message_and_status_2(
    args, message, base, rows, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = rows.with_name("text.txt")
    text.write_text("the quick brown fox " * 8)
    places = {
        "base": base,
        "rows": rows,
        "run": run_folder,
        "tmp": tmp_path,
        "text": text,
    }
    assert message in refused(capsys, *(arg.format(**places) for arg in args))
    assert not (tmp_path / "o").exists()


def test_an_unknown_architecture_names_those_known(base: Path, tmp_path: Path, capsys):
    shutil.copytree(base, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    error = refused(
        capsys, "quantize", "--model", tmp_path / "m", "--out", tmp_path / "q"
    )
    assert "model_type is 'mamba'" in error and "llama" in error


def test_debug_shows_the_traceback(capsys, tmp_path: Path):
    status, _, error = call(
        capsys, "evaluate", "--model", tmp_path, "--data", __file__, "--debug"
    )
    assert status == 2 and "Traceback" in error


def test_help_names_every_subcommand(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "quantize", "train", "evaluate", "generate", "merge"):
        assert name in out
    assert main([]) == 2


def test_wrong_input_loses_nothing_of_a_run_that_was_to_be_replaced(
    rows: Path, base: Path, run_folder: Path, tmp_path: Path, capsys
):
    out, bad = tmp_path / "a", tmp_path / "bad.jsonl"
    shutil.copytree(run_folder, out)
    bad.write_text("{")
    args = ["train", "--out", out, "--overwrite", *FAST]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "is no folder" in refused(capsys, *args, "--model", "none", "--data", rows)
    assert "is not JSON" in refused(capsys, *args, "--model", base, "--data", bad)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 0", "seed = 1", "another run"),
        ("rank = 2", "rank = 3", "another run|does not fit"),
        ("max_steps = 3", "max_step = 3", "did you mean max_steps"),
        ("[lora]", "[lora", "is not TOML"),
        ("base", "gone", "is no folder"),
    ],
    ids=["seed", "rank", "unknown key", "no TOML", "model gone"],
)
def test_resuming_with_a_changed_config_is_refused(
    run_folder: Path, tmp_path: Path, capsys, old: str, new: str, message: str
):
    out = tmp_path / "a"
    shutil.copytree(run_folder, out)
    config = out / "config.toml"
    config.write_text(config.read_text().replace(old, new))
    metrics = (out / "metrics.jsonl").read_text()
    assert re.search(message, refused(capsys, "train", "--resume", out))
    assert (out / "metrics.jsonl").read_text() == metrics


def test_resuming_without_a_checkpoint_says_so(
    run_folder: Path, tmp_path: Path, capsys
):
    shutil.copytree(run_folder, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    error = refused(capsys, "train", "--resume", tmp_path / "a")
    assert "no checkpoint to resume from" in error and "--train.save-every" in error


def test_a_run_is_resumed_from_another_folder(
    base: Path, rows: Path, tmp_path: Path, capsys, monkeypatch
):
    # Paths that were relative where the run began.
    shutil.copytree(base, tmp_path / "models" / "base")
    shutil.copy(rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    args = ["--model", "models/base", "--data", "rows.jsonl", "--out", "runs/a", *FAST]
    status, _, _ = call(capsys, "train", *args, "--train.max-steps", 1)
    assert status == 0
    monkeypatch.chdir(tmp_path / "models")
    status, _, error = call(capsys, "train", "--resume", "../runs/a")
    assert status == 0, error


def test_an_adapter_of_another_base_or_in_pieces_is_refused(
    rows: Path, base: Path, run_folder: Path, tmp_path: Path, capsys
):
    other = tiny.write_folder(tmp_path / "other", tiny.decoder(seed=1))
    args = ["evaluate", "--data", rows, "--adapter"]
    error = refused(capsys, *args, run_folder, "--model", other)
    assert "its base had other weights" in error
    broken = tmp_path / "a"
    shutil.copytree(run_folder, broken)
    shutil.rmtree(broken / "adapter" / "arrays")
    assert "arrays" in refused(capsys, *args, broken, "--model", base)
    (broken / "config.toml").write_text("[quant")
    assert "is not TOML" in refused(capsys, *args, broken, "--model", base)
    (broken / "adapter" / "adapter.json").write_text('{"format": 1, "lora": {}}')
    assert "adapter.json" in refused(capsys, *args, broken, "--model", base)


def test_a_folder_without_tokenizer_can_be_quantized_and_no_more(
    rows: Path, base: Path, tmp_path: Path, capsys
):
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "tokenizer.json").unlink()
    for args in (
        ["generate", "--prompt", "a"],
        ["evaluate", "--data", rows],
        ["train", "--data", rows, "--out", tmp_path / "o"],
    ):
        assert "has no tokenizer.json" in refused(capsys, *args, "--model", bare)
    quantize = ["quantize", "--model", bare, "--out", tmp_path / "q"]
    assert call(capsys, *quantize)[0] == 0
    again = ["quantize", "--model", tmp_path / "q", "--out", tmp_path / "r"]
    assert "4-bit already" in refused(capsys, *again)


def test_a_model_saved_over_a_sharded_one_is_the_one_that_loads(
    base: Path, run_folder: Path, tmp_path: Path, capsys
):
    out = tmp_path / "m"
    save_model(tiny.decoder(seed=1), out, shard_bytes=100_000)
    assert (out / "model.safetensors.index.json").exists()
    (out / "mine.txt").write_text("mine")
    merge = ["merge", "--model", base, "--adapter", run_folder, "--out", out]
    assert call(capsys, *merge, "--overwrite", "--dtype", "float32")[0] == 0
    assert (out / "mine.txt").read_text() == "mine"
    merged, _ = load(out, dtype="float32")
    wanted = merge_adapter(load_adapter(run_folder, tiny.decoder()), dtype="float32")
    x = tiny.tokens()
    np.testing.assert_allclose(
        tiny.logits(merged, x), tiny.logits(wanted, x), atol=1e-5
    )


@pytest.mark.slow
def test_an_adapter_can_start_from_what_quantization_lost(
    base: Path, rows: Path, tmp_path: Path, capsys
):
    args = ["train", "--data", rows, "--data.eval-rows", "2", *FAST]
    args += ["--train.max-steps", "2", "--lora.rank", "8", "--lora.init"]
    status, one, said = call(
        capsys, *args, "qera", "--model", base, "--out", tmp_path / "a"
    )
    assert status == 0, said
    assert "qera: quantization changes a linear's output by" in said
    assert one["compensated_error"] < 0.9 * one["quantization_error"]
    metrics = read_metrics(tmp_path / "a" / "metrics.jsonl")

    # The same from a 4-bit folder, whose original is elsewhere.
    status, _, _ = call(capsys, "quantize", "--model", base, "--out", tmp_path / "q")
    assert status == 0
    args += ["loftq", "--model", tmp_path / "q"]
    status, _, said = call(capsys, *args, "--out", tmp_path / "b")
    assert status == 2 and "give the dense folder (--original)" in said
    status, two, said = call(capsys, *args, "--original", base, "--out", tmp_path / "b")
    assert status == 0, said
    assert two["compensated_error"] < two["quantization_error"]

    # What trained is what is evaluated, and what merges is the 4-bit base.
    held = metrics[-1]["eval_loss"]
    assert held == one["eval_loss"]
    merge = ["merge", "--model", base, "--adapter", tmp_path / "a"]
    status, _, said = call(capsys, *merge, "--out", tmp_path / "m")
    assert status == 2 and "belongs to the 4-bit base" in said
    status, _, said = call(
        capsys, *merge, "--quant.codebook", "nf4", "--out", tmp_path / "m"
    )
    assert status == 0, said


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_status_1(
    base: Path, rows: Path, tmp_path: Path, capsys
):
    args = ["--model", base, "--data", rows, "--out", tmp_path / "a", *FAST]
    args += ["--train.learning-rate", "1e38", "--train.max-grad-norm", "None"]
    status, _, error = call(capsys, "train", *args, "--train.max-steps", 5)
    assert status == 1
    assert "the loss is" in error and "Traceback" not in error
