"""The plan against XLA's own account, and what 48 GB and 8 GB cards are promised."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import apart
import jax
import pytest
from flax import nnx

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig
from qlora_jax.budget.estimate import (
    FITTED,
    MARGIN,
    TURNS_MARGIN,
    abstract_parts,
    estimate,
    tree_bytes,
)
from qlora_jax.budget.plan import (
    FOLLOWING,
    PICKED,
    Plan,
    describe_change,
    flags_of,
    free_streaming_tokens,
    parse_bytes,
    plan_memory,
    relative_time,
)
from qlora_jax.budget.setup import Setup
from qlora_jax.config.quant import QuantOptions
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.train.compiled import account, compile_step
from scripts.bench import memory
from scripts.bench.memory import ALL, TABLES, setup_of
from scripts.gpu.step import measured
from scripts.make import fit_memory

ROOT = Path(__file__).parents[2]

IN_SAMPLE = {"gpu": 0.036, "cpu": 0.042}
"""The largest error of the coefficients on the rows they were fitted to, of a step's all.
It says that estimate.py still is what was fitted, nothing of other models."""
HOST = 5e-3
"""The error allowed, relative to what is planned for the host, which is counted: XLA's own
account differs by a buffer or two of a micro-batch's activations."""
LEFT_OUT = {"gpu": (0.024, 0.171), "cpu": (0.029, 0.119)}
"""Typical (median) and largest error of a fit on a model that it was made without."""
BEYOND_THE_MARGIN = {
    ("gpu", "qwen2-0.5b", '{"max_tokens": 1024, "embedding": "4bit"}'),
    ("gpu", "qwen2-0.5b", '{"max_tokens": 256, "embedding": "4bit"}'),
    (
        *("gpu", "llama-1b"),
        '{"stream": true, "grad_accum": 8, "checkpoint": "none", "max_tokens": 512}',
    ),
}
"""Predictions of left-out models that even their margin does not cover. No other model of
the grid has a 4-bit head in pieces, or streams with all activations kept, so that the fits
without these two know nothing of it; the library's has them."""
REFITTED = 5e-3
"""Relative, of the largest error of a fit: coefficients are recorded with 3 decimals."""
VERSIONS = 0.03
"""What another jax may assign other than the one that was recorded."""
GB, GIB = 10**9, 1 << 30


PLATFORMS = pytest.mark.parametrize("platform", ["gpu", "cpu"])


def read(name: str) -> list[dict]:
    lines = (ROOT / "scripts/results" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def left_out(platform: str) -> list[dict]:
    lines = read("memory_held_out.jsonl")
    return [line for line in lines if line["platform"] == platform]


@PLATFORMS
def test_the_coefficients_are_the_fit_of_the_recorded_rows(platform):
    rows, wrong = fit_memory.recorded(platform), []
    assert len(rows) >= 40
    for row in rows:
        plan = estimate(setup_of(row["model"], row["changes"]), platform)
        off = plan.device_bytes / fit_memory.xla_bytes(row) - 1
        host = plan.host_bytes - row["xla"]["host"]
        if abs(off) > IN_SAMPLE[platform] or abs(host) > HOST * plan.host_bytes:
            wrong.append((row["model"], row["changes"], f"{off:+.1%}", host))
    assert wrong == []


@PLATFORMS
def test_each_recorded_row_was_predicted_once_by_a_fit_without_its_model(platform):
    def kind(row: dict) -> tuple[bool, str]:
        return row["changes"].get("checkpoint") != "none", row["model"]

    rows, lines = fit_memory.recorded(platform), left_out(platform)
    predicted = [
        ((line["recomputes"], line["left_out"]), p["changes"], p["xla_bytes"])
        for line in lines
        for p in line["predictions"]
    ]
    wanted = [(kind(row), row["changes"], fit_memory.xla_bytes(row)) for row in rows]
    assert sorted(map(repr, predicted)) == sorted(map(repr, wanted))
    for line in lines:
        others = [
            row
            for row in rows
            if kind(row)[0] == line["recomputes"] and row["model"] != line["left_out"]
        ]
        assert line["fitted_rows"] == len(others)


@PLATFORMS
def test_a_fit_is_off_by_so_much_on_a_model_that_it_has_not_seen(platform):
    sizes, beyond = [], set()
    for line in left_out(platform):
        kind = (platform, line["recomputes"])
        fitted = {**FITTED, kind: line["coefficients"]}
        for made in line["predictions"]:
            setup = setup_of(line["left_out"], made["changes"])
            plan = estimate(setup, platform, fitted)
            # Else `python -m scripts.make.fit_memory --held-out` makes the record anew.
            assert plan.device_bytes == made["predicted_bytes"], made
            sizes.append(abs(plan.device_bytes / made["xla_bytes"] - 1))
            if plan.safe_bytes < made["xla_bytes"]:
                beyond.add((platform, line["left_out"], json.dumps(made["changes"])))
    typical, largest = LEFT_OUT[platform]
    assert sorted(sizes)[len(sizes) // 2] == pytest.approx(typical, abs=5e-4)
    assert max(sizes) == pytest.approx(largest, abs=5e-4)
    assert beyond == {key for key in BEYOND_THE_MARGIN if key[0] == platform}


@pytest.mark.parametrize(
    ("platform", "model"), [("gpu", "gemma2-2b"), ("cpu", "llama-1b")]
)
def test_the_fit_without_a_model_is_made_without_it(platform, model):
    (line,) = (
        x
        for x in left_out(platform)
        if (x["recomputes"], x["left_out"]) == (True, model)
    )
    rows = [
        row
        for row in fit_memory.rows_of(platform)
        if row["recomputes"] and row["row"]["model"] != model
    ]
    # The least largest error is one number, though other coefficients may reach it too.
    assert fit_memory.fit(rows)[1] == pytest.approx(line["fitted_error"], rel=REFITTED)
    names = {name for row in rows for _, name in row["features"]}
    given = dict.fromkeys(names, 0.0) | line["coefficients"]
    error = fit_memory.largest_error(rows, fit_memory.sums_of(rows, given))
    assert error == pytest.approx(line["fitted_error"], rel=REFITTED)


UNSEEN = {
    ("gpu", "smollm2-360m"): 0.01,
    ("gpu", "qwen3-4b"): 0.06,
    ("gpu", "gemma3-1b"): 0.27,
    ("gpu", "qwen3-30b-a3b"): 0.04,
    ("gpu", "qwen3.5-27b"): 0.16,
    ("gpu", "gemma4-31b"): 0.04,
    ("gpu", "gemma4-26b-a4b"): 0.07,
    ("gpu", "gemma4-e2b"): 0.19,
    ("gpu", "gpt-oss-20b"): 0.06,
    ("gpu", "gpt-oss-120b"): 0.03,
    ("cpu", "smollm2-360m"): 0.08,
    ("cpu", "qwen3-4b"): 0.02,
    ("cpu", "gemma3-1b"): 0.04,
    ("cpu", "qwen3-30b-a3b"): 0.07,
    ("cpu", "qwen3.5-2b"): 0.12,
}
"""The largest error of the plan on models that no fit has had, as it was measured."""


def test_models_that_no_fit_has_seen_are_predicted_so_well():
    assert not memory.UNSEEN.keys() & memory.MODELS.keys()
    found: dict[tuple[str, str], float] = {}
    for row in read("memory_unseen.jsonl"):
        assert row["model"] in memory.UNSEEN
        platform = "cpu" if row["target"] == "cpu" else "gpu"
        plan = estimate(setup_of(row["model"], row["changes"]), platform)
        xla = fit_memory.xla_bytes(row)
        assert plan.safe_bytes >= xla
        off = abs(plan.device_bytes / xla - 1)
        key = platform, row["model"]
        found[key] = max(off, found.get(key, 0.0))
    assert found.keys() == UNSEEN.keys()
    for key, off in found.items():
        assert UNSEEN[key] - 0.011 < off <= UNSEEN[key], (key, off)


def test_the_readme_says_the_errors_on_models_that_were_left_out():
    text = " ".join((ROOT / "README.md").read_text().split())
    results = " ".join((ROOT / "scripts/results/README.md").read_text().split())
    for typical, largest in LEFT_OUT.values():
        assert f"{100 * typical:.1f} % ({100 * largest:.0f} % at most)" in text
        assert (
            f"{100 * typical:.1f} % typically, {100 * largest:.1f} % at most" in results
        )
    kept = f"keeps {MARGIN:.0%} free, {TURNS_MARGIN:.0%} where layers take turns"
    assert kept.replace("%", " %") in text


@pytest.mark.parametrize("place", [0, 1])
def test_the_record_is_what_this_jax_assigns(place):
    # XLA's account is of one XLA: the record is not what an older one assigns.
    if jax.__version_info__ < (0, 12):
        pytest.skip("recorded with jax 0.12; jax 0.10 takes 6 to 26 % more on a CPU")
    # One of plain layers, one of layers in turns.
    models = ("smollm2-135m", "gemma2-2b")
    rows = fit_memory.recorded("cpu")
    row = next(row for row in rows if row["model"] == models[place])
    xla = account(compile_step(setup_of(row["model"], row["changes"])))
    assert xla.arguments == row["xla"]["arguments"]
    whole = row["xla"]["arguments"] + row["xla"]["temporaries"]
    assert abs(xla.device - whole) < VERSIONS * whole


@pytest.mark.slow
def test_a_step_with_int8_tables_needs_less_than_with_dense_ones():
    # Of shapes at which the tables are most of it; the head in pieces.
    def device(**tables: str) -> int:
        setup = setup_of("smollm2-135m", {"max_tokens": 64, **tables})
        config = dataclasses.replace(setup.config, num_layers=1)
        return account(compile_step(dataclasses.replace(setup, config=config))).device

    dense, int8 = device(), device(embedding="int8")
    table = 49152 * 576
    # All of what a table in int8 saves but a piece of it and the logits.
    assert int8 < dense - table // 2


def test_int8_tables_are_taken_before_4_bit_ones():
    setup = setup_of("llama-8b", {})
    held = [dataclasses.replace(setup, embedding=x, head=x) for x in ("int8", "4bit")]
    int8, four_bit = (estimate(x).safe_bytes for x in held)
    assert four_bit < int8 < estimate(setup).safe_bytes
    fixed = ("micro_batch", "checkpoint", "stream", "offload")
    for size, flag in ((int8, "--quant.head int8"), (int8 - 1, "--quant.head 4bit")):
        assert flag in flags_of(plan_memory(setup, size, fixed=fixed).setup)


@pytest.mark.aot
@pytest.mark.rotates
@pytest.mark.parametrize(
    ("model", "changes", "gigabytes", "gemm"),
    [
        ("llama-8b", TABLES, 6.6, "triton"),
        ("llama-70b", ALL, 42, "triton"),
        ("llama-70b", {**ALL, "max_tokens": 8192}, 48, "triton"),
        ("llama-70b", {**ALL, "stream": True}, 6.5, "cublas"),
    ],
    ids=["8b", "70b", "70b long", "70b streamed"],
)
def test_an_h200s_step_takes_no_more_than(model, changes, gigabytes, gemm):
    # Each was compiled with both (scripts/results/README.md); the two differ by 1 %.
    import aot

    # Four compilations of half a minute: once in .ci/run, on the jax that GPUs are for.
    if jax.__version__ != "0.11.2":
        pytest.skip("recorded with, and held to on, jax 0.11.2 (.ci/run)")
    # Only CUDA's wheels have a compiler for it, which .ci/run installs.
    if reason := aot.available() or aot.without_cudnn():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")
    options = {} if gemm == "triton" else {"xla_gpu_enable_triton_gemm": False}
    setup = dataclasses.replace(setup_of(model, changes), lora=LoRAConfig(rank=16))
    assert account(compile_step(setup, "h200", options)).device <= gigabytes * GB


MATTERING = {
    **{"micro_batch": 2, "grad_accum": 2, "optimizer": "adamw8bit", "stream": True},
    **{"compute_dtype": "float32", "checkpoint": "none", "offload": True},
}
"""Settings of TrainConfig that memory depends on -> another value than the plain run's.
resident_bytes is with offload."""


def test_a_setting_of_training_that_matters_reaches_the_estimate_by_its_name():
    plain = setup_of("smollm2-135m", {})
    assert plain.train == TrainConfig(micro_batch=1, grad_accum=1, checkpoint="layer")
    for name, value in MATTERING.items():
        train = dataclasses.replace(plain.train, **{name: value})
        setup = dataclasses.replace(plain, train=train)
        assert setup == dataclasses.replace(plain, **{name: value})
        assert setup == setup_of("smollm2-135m", {name: value})
        assert getattr(setup, name) == value
        assert estimate(setup) != estimate(plain), name
    away = dataclasses.replace(plain, offload=True)
    some = dataclasses.replace(away, resident_bytes=1000)
    assert estimate(away).host_bytes == estimate(some).host_bytes + 1000
    assert dataclasses.replace(plain, dtype="float32").dtype == "float32"
    with pytest.raises(TypeError, match="Setup has no micro_bach"):
        setup_of("smollm2-135m", {"micro_bach": 2})
    with pytest.raises(ConfigError, match="--train.grad-accum is 0"):
        setup_of("smollm2-135m", {"grad_accum": 0})


def test_a_setting_of_training_that_does_not_matter_changes_nothing():
    plain = setup_of("smollm2-135m", {})
    others = {
        **{"max_steps": 3, "epochs": 2.0, "learning_rate": 1.0, "lora_plus_ratio": 2.0},
        **{"schedule": "cosine", "warmup_ratio": 0.5, "max_grad_norm": None, "seed": 1},
        **{"weight_decay": 0.1, "beta1": 0.5, "beta2": 0.5, "eval_every": 1},
        **{"save_every": None, "keep_checkpoints": 1, "resident_bytes": 1},
        **{"save_minutes": 1.0, "check_finite": True, "max_skipped": 1},
        **{"router_aux_loss": 0.1},
    }
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == others.keys() | MATTERING.keys()
    assert estimate(dataclasses.replace(plain, **others)) == estimate(plain)


def test_what_a_folder_keeps_dense_is_counted_so(tmp_path):
    base, _ = qlora.load(apart.mixed(tmp_path / "base"), dtype="float32")
    setup = Setup(config=base.config, dtype="float32", lora=LoRAConfig(rank=2))
    held = sum(
        tree_bytes(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(base))
        if path[0] == "layers"
    )
    assert estimate(setup).device["layers"] == held
    packed = dataclasses.replace(base.config, layers=())
    assert estimate(dataclasses.replace(setup, config=packed)).device["layers"] < held


def test_what_a_plan_picks_are_settings_of_a_run():
    known = {**vars(TrainConfig()), **vars(QuantOptions())}
    assert set(PICKED) <= known.keys() and set(FOLLOWING) < set(PICKED)
    least = {"checkpoint": "host", "offload": True, "stream": True, "head": "int8"}
    setup = setup_of("smollm2-135m", {**least, "resident_bytes": 7, "micro_batch": 3})
    flags = (
        "--train.micro-batch 3 --train.grad-accum 1 --train.checkpoint host "
        "--train.offload --train.resident-bytes 7 --train.stream --quant.head int8"
    )
    assert flags_of(setup) == flags
    fewer = dataclasses.replace(setup, offload=False, head="none", checkpoint="none")
    assert flags_of(fewer) == (
        "--train.micro-batch 3 --train.grad-accum 1 --train.checkpoint none --train.stream"
    )
    change = describe_change(setup, dataclasses.replace(fewer, micro_batch=1))
    assert change.startswith(
        "micro-batch 3 -> 1, checkpoint host -> none, offload on -> off, head int8 -> none"
    )


def test_parts_are_counted_exactly():
    setup = setup_of("qwen2-0.5b", {})
    _, lora, base = abstract_parts(setup)
    plan = estimate(setup)
    parts = ("layers", "embedding", "head")
    assert sum(plan.device[part] for part in parts) == tree_bytes(base)
    assert plan.device["adapter"] == plan.device["gradients"] == tree_bytes(lora)
    streamed = estimate(dataclasses.replace(setup, stream=True, offload=True))
    assert streamed.host["layers"] == plan.device["layers"]
    assert streamed.host["optimizer state"] == plan.device["optimizer state"]
    assert "layers" not in streamed.device


def test_more_memory_is_never_slower_and_always_kept_to():
    setup, before = setup_of("llama-8b", {}), float("inf")
    for size in (6, 8, 12, 16, 24, 48, 80):
        plan = plan_memory(setup, size * GIB, rows=16)
        assert plan.memory.safe_bytes <= size * GIB
        assert plan.setup.micro_batch * plan.setup.grad_accum == 16
        assert relative_time(plan.setup) <= before
        before = relative_time(plan.setup)
        if plan.next_step is not None:
            more, what = plan.next_step
            better = plan_memory(setup, size * GIB + more, rows=16)
            assert relative_time(better.setup) < before and "faster" in what


def test_the_papers_claim_and_ours():
    setup = setup_of("llama-70b", {})
    plan = plan_memory(setup, parse_bytes("48GB"), rows=16)
    assert not plan.setup.stream
    small = plan_memory(setup, parse_bytes("8GB"), rows=16)
    assert small.setup.stream and "--train.stream" in flags_of(small.setup)
    assert small.memory.host["layers"] > 35 * GB
    assert 1000 < free_streaming_tokens(small.setup) < 4000


def test_only_what_does_not_fit_of_the_optimizer_state_is_paged():
    setup = dataclasses.replace(setup_of("llama-8b", {}), lora=LoRAConfig(rank=64))
    state = estimate(setup).device["optimizer state"]
    all_here = estimate(setup).device_bytes
    fixed = ("micro_batch", "checkpoint", "stream", "embedding")

    def planned(needed: int) -> Plan:
        budget = math.ceil((1 + estimate(setup).margin) * needed)
        plan = plan_memory(setup, budget, fixed=fixed)
        assert plan.memory.safe_bytes <= budget
        return plan

    assert not planned(all_here).setup.offload
    resident = []
    for needed in (all_here - state, all_here - state // 4, all_here - 1):
        plan = planned(needed)
        assert plan.setup.offload
        assert sum(plan.memory.host.values()) == state - plan.setup.resident_bytes
        resident.append(plan.setup.resident_bytes)
    assert resident[0] == 0 < resident[1] < resident[2] < state
    assert "--train.resident-bytes" in flags_of(plan.setup)


def test_8_bit_moments_are_a_quarter():
    plain = setup_of("llama-8b", {"lora": {"rank": 64}})
    small = dataclasses.replace(plain, optimizer="adamw8bit")
    states = [estimate(x).device["optimizer state"] for x in (plain, small)]
    assert 0.25 < states[1] / states[0] < 0.26


def test_micro_batches_share_the_copy_of_a_streamed_layer():
    one = setup_of("llama-8b", {"stream": True, "max_tokens": 512})
    four = dataclasses.replace(one, grad_accum=4)
    waiting = [estimate(x).device["activations for backward"] for x in (one, four)]
    assert waiting[1] == 4 * waiting[0]
    assert relative_time(four) < relative_time(one)
    assert free_streaming_tokens(four) == free_streaming_tokens(one)


def test_what_is_fixed_stays():
    setup = setup_of("llama-8b", {"micro_batch": 2, "grad_accum": 2})
    fixed = ("micro_batch", "checkpoint", "stream", "offload", "head")
    plan = plan_memory(setup, 80 * GIB, fixed=fixed)
    assert plan.setup == setup


def test_a_budget_that_nothing_fits_says_the_least():
    setup = setup_of("llama-70b", {})
    with pytest.raises(
        ConfigError, match=r"nothing fits in 2.00 GiB; the least is 4\.\d"
    ):
        plan_memory(setup, 2 * GIB, rows=1)
    with pytest.raises(
        ConfigError, match="with no more than 16.00 GiB of the host it is"
    ):
        plan_memory(setup, 8 * GIB, rows=1, host_bytes=16 * GIB)
    assert parse_bytes("1.5 GiB") == 3 * GIB // 2 and parse_bytes("100") == 100
    for wrong in ("8cows", "GiB", "-1GiB", "0"):
        with pytest.raises(ConfigError, match="--memory"):
            parse_bytes(wrong)


@pytest.mark.slow
def test_the_suites_measured_step_runs():
    setup = setup_of("smollm2-135m", {"max_tokens": 16, "grad_accum": 2})
    config = dataclasses.replace(setup.config, num_layers=1, vocab_size=512)
    away = {"stream": True, "offload": True, "checkpoint": "host"}
    setup = dataclasses.replace(setup, config=config, **away)
    figures = measured(setup, contextlib.nullcontext, 1)
    assert 5 < figures["loss"] < 7  # of 512 tokens, by chance
    assert figures["host_bytes"] == figures["plan"]["device"]["layers"]
    assert figures["tokens_per_s"] == 2 * 16 / figures["step_s"]
    assert figures["copies_s"] > 0


def test_an_unknown_gpu_is_named():
    with pytest.raises(
        ConfigError, match="no GPU 'tpu' is known; there are a100, h200"
    ):
        compile_step(setup_of("smollm2-135m", {}), "tpu")


def test_setup_is_public():
    assert qlora.Setup is Setup and qlora.plan_memory is plan_memory
