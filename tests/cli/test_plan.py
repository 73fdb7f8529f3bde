"""qlora plan, and what `qlora train` does with a memory limit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.budget.estimate import estimate
from qlora_jax.cli import memory
from qlora_jax.cli import train as cli_train
from qlora_jax.cli.main import main
from qlora_jax.data import read_dataset
from qlora_jax.errors import ConfigError
from qlora_jax.objectives import SFT
from qlora_jax.sources.load import load
from qlora_jax.sources.source import open_source
from qlora_jax.train.loop import Trainer
from qlora_jax.train.steps import batches_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("plan") / "base")


def call(capsys, *args: object) -> tuple[int, dict, str]:
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else {}, err


def test_a_plan_is_printed_and_compared_with_xla(base: Path, capsys):
    status, figures, _ = call(
        *(capsys, "plan", "--model", base, "--memory", "1GiB", "--max-tokens", 64),
        *("--exact", "--for", "cpu", "--rows", 4),
    )
    assert status == 0
    assert figures["device_bytes"] == sum(figures["device"].values())
    assert figures["micro_batch"] * figures["grad_accum"] == 4
    assert figures["flags"].startswith("--train.micro-batch")
    assert figures["xla"]["device"] > 0


def test_what_fits_nowhere_ends_with_the_least_that_would(base: Path, capsys):
    status, _, err = call(capsys, "plan", "--model", base, "--memory", "100KiB")
    assert status == 2 and "nothing fits in" in err and "the least is" in err


def train(base: Path, tmp_path: Path, *more: object) -> list[object]:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.sums(8))
    return [
        *("train", "--model", base, "--data", data, "--out", tmp_path / "run"),
        *("--train.max-steps", 2, "--lora.rank", 2, *more),
    ]


def test_a_run_that_cannot_fit_is_refused_with_settings_that_would(
    base: Path, tmp_path: Path, capsys
):
    args = train(base, tmp_path, "--memory", "100KiB", "--train.micro-batch", 16)
    status, _, err = call(capsys, *args)
    assert status == 2
    assert "needs about" in err and "has 0.00 GiB" in err
    assert not (tmp_path / "run").exists()
    args = train(base, tmp_path, "--memory", "12MiB", "--train.micro-batch", 512)
    status, _, err = call(capsys, *args)
    assert status == 2 and "It would fit with --train.micro-batch" in err


@pytest.mark.slow
def test_the_micro_batch_can_be_chosen(base: Path, tmp_path: Path, capsys):
    auto = ("--train.micro-batch", "auto")
    status, _, err = call(capsys, *train(base, tmp_path, *auto))
    assert status == 2 and "give --memory" in err
    args = train(base, tmp_path, *auto, "--memory", "2GiB")
    status, _, err = call(capsys, *args)
    assert status == 0 and "--train.micro-batch 16 --train.grad-accum 1" in err
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "micro_batch = 16" in config and "grad_accum = 1" in config


def test_the_optimizer_state_leaves_only_where_it_must(
    base: Path, tmp_path: Path, monkeypatch
):
    # What a GPU's user would be told; nothing is allocated.
    monkeypatch.setattr(cli_train.jax, "default_backend", lambda: "gpu")
    flags = train(base, tmp_path, "--train.offload", "auto", "--lora.rank", 32)
    args = cli_train.parse([str(flag) for flag in flags[1:]], "qlora train")
    rows = read_dataset(args.data_file, tiny.tokenizer(), args.data)
    rows = batches_of(rows, args.train, SFT, args.data.packing)
    setup = memory.setup_of(args, open_source(base), qlora.QuantConfig(), rows)
    assert (setup.train, setup.lora) == (args.train, args.lora)
    away = dataclasses.replace(setup, offload=True)

    def fitted(limit: int) -> bool:
        limited = dataclasses.replace(args, memory=str(limit))
        known = memory.within_memory(
            limited, open_source(base), qlora.QuantConfig(), rows
        )
        return known.train.offload

    assert not fitted(estimate(setup).safe_bytes)
    assert fitted(estimate(away).safe_bytes)
    with pytest.raises(ConfigError, match="the least is"):
        fitted(estimate(away).safe_bytes - 1)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="with no more than 0.00 GiB of the host"):
        fitted(estimate(away).safe_bytes)


def test_a_run_near_the_limit_is_told_that_it_may_run_out(
    base: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(cli_train.jax, "default_backend", lambda: "gpu")
    flags = train(base, tmp_path, "--train.micro-batch", 1)
    args = cli_train.parse([str(flag) for flag in flags[1:]], "qlora train")
    rows = read_dataset(args.data_file, tiny.tokenizer(), args.data)
    rows = batches_of(rows, args.train, SFT, args.data.packing)
    quant = qlora.QuantConfig()
    need = estimate(memory.setup_of(args, open_source(base), quant, rows))

    def told(limit: int) -> str:
        limited = dataclasses.replace(args, memory=str(limit))
        assert memory.within_memory(limited, open_source(base), quant, rows) == limited
        return capsys.readouterr().err

    assert told(need.safe_bytes) == ""
    assert "can be 12% too low" in told(need.safe_bytes - 1)
    assert "may run out" in told(need.device_bytes)
    with pytest.raises(ConfigError, match="this run needs about"):
        told(need.device_bytes - 1)


def test_a_host_without_enough_memory_is_told_before_the_run(
    base: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(cli_train.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
    args = train(base, tmp_path, "--train.stream", "--memory", "8GiB")
    status, _, err = call(capsys, *args)
    assert status == 2
    assert "in host memory, of which 0.00 GiB are free. It would fit with" in err


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.",
            "123",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1.50GiB", "1.50GiB"),
        ("RESOURCE_EXHAUSTED: failed", ""),
    ],
)
def test_a_device_that_runs_out_of_memory_is_answered_with_what_would_fit(
    base: Path, tmp_path: Path, capsys, monkeypatch, error: str, asked: str
):
    def fit(self, **how):
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(Trainer, "fit", fit)
    args = train(base, tmp_path, "--memory", "8GiB", "--train.no-stream")
    status, _, err = call(capsys, *args)
    assert status == 1 and "Traceback" not in err
    assert f"ran out of memory{asked and f', asking for {asked}'}" in err
    assert "this run needs 0.0" in err and "and 8.00 GiB were there" in err
    assert (
        "With other settings too, nothing fits" in err or "--train.micro-batch" in err
    )
    status, _, err = call(capsys, *args, "--overwrite", "--train.max-steps", 1)
    assert status == 1 and "--resume" in err


@pytest.mark.slow
def test_a_streamed_run_is_the_run(base: Path, tmp_path: Path, capsys):
    losses = []
    flags = ("--train.offload", *("--quant.embedding", "4bit"), "--lora.dora")
    whole = ("--train.micro-batch", 8, "--train.grad-accum", 1)
    for stream in ("--train.no-stream", "--train.stream"):
        args = train(base, tmp_path, stream, "--overwrite", *whole, *flags)
        status, figures, err = call(capsys, *args)
        assert status == 0, err
        losses.append(figures["loss"])
    assert losses[0] == losses[1]


def test_a_base_loads_straight_into_host_memory(base: Path):
    quant = qlora.QuantConfig()
    here, there = (load(base, quant, "float32", stream=s)[0] for s in (False, True))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(nnx_state(there))}
    assert kinds == {"pinned_host"}
    for one, other in zip(tiny.frozen(here), tiny.frozen(there), strict=True):
        np.testing.assert_array_equal(one, other)


def nnx_state(model):
    from flax import nnx

    return nnx.state(model.layers)
