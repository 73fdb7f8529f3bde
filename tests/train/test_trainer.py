"""Trainer: a run folder, its metrics and checkpoints, and resuming bit for bit."""

import dataclasses
import json
import math
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny
from models import family_folders

import qlora_jax as qlora
from qlora_jax import digests
from qlora_jax.adapters import LoRAConfig, attach, split
from qlora_jax.adapters.names import flatten
from qlora_jax.config.data import Packing
from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import CheckpointError, OutputExistsError, QLoRAError
from qlora_jax.exchange.ours import load_adapter
from qlora_jax.train.loop import DivergedError, Trainer
from qlora_jax.train.metrics import MetricsLog, read_metrics
from qlora_jax.train.older_state import older
from qlora_jax.train.report import plot_loss, write_report

CONFIG = TrainConfig(
    max_steps=6,
    micro_batch=2,
    grad_accum=2,
    learning_rate=5e-3,
    schedule="cosine",
    warmup_ratio=0.4,
    save_every=2,
    compute_dtype="float32",
    seed=3,
)
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.1)
ROWS = tiny.rows([16, 9, 12, 5, 16, 7, 11])
"""7, so that steps of 4 rows straddle epochs."""
HELD = tiny.rows([16, 8, 10], seed=1)


class Stop(Exception):
    """What a test stops a run with."""


def model_of(config: TrainConfig = CONFIG, lora: LoRAConfig = LORA) -> Any:
    base = tiny.quantized(config.compute_dtype)
    return attach(base, lora, key=jax.random.key(config.seed))


def trainer(
    out: Path,
    config: TrainConfig = CONFIG,
    *,
    model: Any = None,
    lora: LoRAConfig = LORA,
    rows: Any = ROWS,
    held: Any = None,
    stop_at: int | None = None,
    progress: Callable[[dict], None] | None = None,
    packing: Packing = "auto",
) -> Trainer:
    def stop(metrics: dict[str, Any]) -> None:
        if progress is not None:
            progress(metrics)
        if metrics["step"] == stop_at and "loss" in metrics:
            raise Stop

    model = model or model_of(config, lora)
    more: Any = {"evaluation": held, "lora": lora, "packing": packing}
    return Trainer(model, rows, config, out, progress=stop, **more)


def losses(out: Path) -> dict[int, tuple[float, float]]:
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert len(rows) == len({row["step"] for row in rows})
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def without_seconds(figures: dict[str, Any]) -> dict[str, Any]:
    assert {"steps", "loss", "tokens", "seconds"} <= figures.keys()
    return {name: value for name, value in figures.items() if name != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, compute_dtype="bfloat16", offload=True),
        dataclasses.replace(CONFIG, compute_dtype="float16"),
    ],
    ids=["bfloat16, offload", "float16"],
)
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped(config, tmp_path):
    whole = trainer(tmp_path / "whole", config)
    figures = whole.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "parts", config, stop_at=5).fit()
    assert set(losses(tmp_path / "parts")) == {1, 2, 3, 4, 5}
    resumed = trainer(tmp_path / "parts", config)
    assert without_seconds(resumed.fit(resume=True)) == without_seconds(figures)
    assert resumed.start == 4
    # Step 5 was taken twice and is there once.
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert set(losses(tmp_path / "whole")) == {1, 2, 3, 4, 5, 6}
    ours, theirs = (tiny.arrays((run.lora, run.opt_state)) for run in (resumed, whole))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    kinds = [
        {x.sharding.memory_kind for x in jax.tree.leaves(run.opt_state) if x.ndim}
        for run in (resumed, whole)
    ]
    assert kinds[0] == kinds[1]
    assert ("pinned_host" in kinds[0]) == config.offload


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, Trainer, dict[str, Any], list[dict]]:
    """A finished run with eval losses: folder, trainer, figures, what was reported."""
    out = tmp_path_factory.mktemp("run") / "a"
    config = dataclasses.replace(CONFIG, eval_every=4, keep_checkpoints=2)
    said = []
    run = trainer(out, config, held=HELD, progress=said.append)
    figures = run.fit()
    return out, run, figures, said


def test_what_stands_in_the_adapters_place_is_refused_before_a_step(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is no adapter; choose another path"):
        trainer(tmp_path).fit()
    assert [x.name for x in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["on", "off"])
def test_nothing_is_compiled_once_a_run_is_warm(packing, tmp_path, caplog):
    """From the second step on, whatever the lengths: each had its program ahead."""
    compiled, said = [], []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            ahead = threading.current_thread().name.startswith("compile")
            compiled.append((ahead, len([row for row in said if "loss" in row])))

    rows = tiny.rows([16, 9, 12, 5, 64, 16, 7, 11, 120, 33])
    config = dataclasses.replace(CONFIG, max_steps=9, eval_every=3)
    model = attach(tiny.quantized(), LORA, key=jax.random.key(3))
    run = Trainer(
        *(model, rows, config, tmp_path / "a"),
        **{"evaluation": HELD, "lora": LORA, "packing": packing},
        progress=said.append,
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with caplog.at_level("INFO", logger="qlora_jax"):
            run.fit()
    finally:
        jax.monitoring.clear_event_listeners()
    shapes = {run.batches.at(step)["tokens"].shape for step in range(9)}
    assert shapes <= {*run.batches.shapes} and len(run.batches.shapes) <= 3
    assert packing == "on" or len(shapes) > 1
    # Step 2 may be on its way before step 1 is reported.
    assert {at for ahead, at in compiled if not ahead} <= {0, 1}
    assert sum(ahead for ahead, _ in compiled) == len(run.batches.shapes) + 1
    lines = [one.getMessage() for one in caplog.records if "compiled" in one.msg]
    for shape in run.batches.shapes:
        assert any(f"the step for {shape} in" in line for line in lines)
    assert any("the evaluation for" in line for line in lines)


def test_metrics_have_one_object_a_step(done):
    out, run, figures, said = done
    rows = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == said
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_s"}
    assert all(wanted | {"device_memory_bytes"} <= row.keys() for row in steps)
    assert steps[2]["learning_rate"] == pytest.approx(5e-3)  # the end of the warm-up
    assert figures["steps"] == 6
    assert figures["tokens"] == sum(row["tokens"] for row in steps)
    assert figures["loss"] == steps[-1]["loss"]


def test_eval_losses_come_before_between_and_after(done):
    out, run, _, _ = done
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert rows[-1]["eval_loss"] == pytest.approx(run.evaluate(HELD))


def test_the_callers_model_is_not_donated(tmp_path):
    model = model_of()
    before = tiny.logits(model, tiny.tokens())
    with pytest.raises(Stop):
        trainer(tmp_path / "a", model=model, stop_at=1).fit()
    np.testing.assert_array_equal(tiny.logits(model, tiny.tokens()), before)


def test_the_adapter_of_the_run_is_the_trained_one(done):
    out, run, _, _ = done
    loaded = load_adapter(out, tiny.quantized())
    x = tiny.tokens()
    np.testing.assert_array_equal(tiny.logits(loaded, x), tiny.logits(run.model, x))
    assert (
        np.abs(tiny.logits(loaded, x) - tiny.logits(tiny.quantized(), x)).max() > 0.01
    )


def test_only_the_newest_checkpoints_are_kept(done):
    out = done[0]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["4", "6"]


def test_nothing_of_the_base_is_in_a_checkpoint(done):
    out, run, _, _ = done
    step = out / "checkpoints" / "6"
    names = json.loads((step / "adapter" / "_METADATA").read_text())["tree_metadata"]
    keys = {entry["key_metadata"][0]["key"] for entry in names.values()}
    assert keys == set(flatten(run.lora))
    names = json.loads((step / "optimizer" / "_METADATA").read_text())["tree_metadata"]
    assert len(names) == len(jax.tree.leaves(run.opt_state))
    assert array_bytes(step / "adapter") == nbytes(run.lora)
    assert array_bytes(step / "optimizer") == nbytes(run.opt_state)
    # Adapter, both moments, and what Orbax writes beside them, for each array.
    ours = nbytes((run.lora, run.opt_state))
    assert stored_bytes(step) < 1.2 * ours + 2000 * (len(keys) + len(names))


def array_bytes(folder: Path) -> int:
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = jax.tree.leaves(checkpointer.metadata(folder).item_metadata.tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def stored_bytes(step: Path) -> int:
    """Counts each entry of Orbax's databases once: a slow disk has them written again."""
    files = [p for p in step.rglob("*") if p.is_file() and p.parent.name != "d"]
    total = sum(p.stat().st_size for p in files)
    for manifest in step.glob("*/manifest.ocdbt"):
        spec = {"driver": "ocdbt", "base": f"file://{manifest.parent}/"}
        store = tensorstore.KvStore.open(spec).result()
        entries = store.list().result()
        assert entries, manifest
        total += sum(len(store.read(key).result().value) for key in entries)
    return total


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(done):
    out, run, figures, _ = done
    before = losses(out)
    again = trainer(out, run.config, held=HELD)
    assert without_seconds(again.fit(resume=True)) == without_seconds(figures)
    assert again.start == 6
    assert losses(out) == before
    for one, other in zip(tiny.arrays(again.lora), tiny.arrays(run.lora), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_killed_while_it_saved_its_adapter_can_be_resumed(tmp_path):
    trainer(tmp_path / "a").fit()
    (tmp_path / "a" / "adapter" / "adapter.json").unlink()  # it is written last
    trainer(tmp_path / "a").fit(resume=True)
    load_adapter(tmp_path / "a", tiny.quantized())


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    message = r"checkpoints has no checkpoint to resume from.*save-every"
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path / "a").fit(resume=True)


def test_a_failed_resume_leaves_the_metrics_as_they_were(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(CheckpointError):
        trainer(tmp_path).fit(resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "(?s)another run.*seed.*3.*4"),
        ({"micro_batch": 4}, "(?s)another run.*batch.*4.*8"),
        ({"max_steps": 9}, "(?s)another run.*steps.*6.*9"),
        ({"rows": tiny.rows([8, 8])}, "(?s)another run.*rows.*7.*2"),
        ({"lora": LoRAConfig(rank=2)}, "rank|does not fit|another run"),
        ({"lora": LoRAConfig(rank=4, targets="q_proj")}, "does not fit|another run"),
        ({"compute_dtype": "float16"}, "another run"),
    ],
    ids=["seed", "batch", "steps", "rows", "rank", "targets", "compute_dtype"],
)
def test_resuming_another_run_is_refused(done, change, message):
    out, run, _, _ = done
    parts = {key: change[key] for key in ("lora", "rows") if key in change}
    fields = {key: value for key, value in change.items() if key not in parts}
    other = trainer(out, dataclasses.replace(run.config, **fields), **parts)
    with pytest.raises(QLoRAError, match=message):
        other.fit(resume=True)
    assert set(losses(out)) == {1, 2, 3, 4, 5, 6}


def test_a_run_that_an_older_version_left_goes_on(done, tmp_path, caplog):
    """It took rows as they are drawn."""
    config = done[1].config
    old = tmp_path / "old"
    figures = trainer(old, config, held=HELD, packing="drawn").fit()
    wrote = {"seed", "batch", "rows", "steps", "compute_dtype", "optimizer", "lora"}
    for path in (old / "checkpoints").glob("*/position/metadata"):
        position = json.loads(path.read_text())
        position = {name: value for name, value in position.items() if name in wrote}
        lora = position["lora"]
        lora |= {"modules_to_save": "", "targets": "q_proj,down_proj"}
        del lora["layers_pattern"]  # which came later
        path.write_text(json.dumps(position))
        for name in (digests.NAME, "adapter.json", "metrics.jsonl"):
            (path.parents[1] / name).unlink()
    other = LoRAConfig(**{**vars(LORA), "targets": ("q_proj", "down_proj")})
    again = trainer(old, config, held=HELD)
    with pytest.raises(
        CheckpointError, match="(?s)lora: it has.*packing: it has 'drawn'"
    ):
        again.fit(resume=True)
    again = trainer(old, config, held=HELD, packing="drawn")
    again._identity["lora"] = other.as_json()
    caplog.clear()
    # The position of an older checkpoint has no eval loss.
    known = {name: x for name, x in figures.items() if not name.startswith("best")}
    assert without_seconds(again.fit(resume=True)) == without_seconds(known)
    assert caplog.text.count("used unchecked") == 1


def test_a_run_whose_layers_were_one_stack_goes_on(golden, tmp_path):
    """Commit a5d6930 left it, which had all of Gemma 2's layers in one stack."""
    with tarfile.open(golden("runs/gemma2_one_stack.tar.xz")) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    (tmp_path / "base").mkdir()
    made = family_folders.read("gemma2", golden)
    base = family_folders.load("gemma2", made, tmp_path / "base", qlora.QuantConfig())
    assert len(base.stacks) == 2
    lora = LoRAConfig(rank=2, alpha=4.0, targets="q_proj,v_proj", layers=(0, 1))
    rows = tiny.rows([16, 9, 12, 5, 16, 7, 11])
    for row in rows.rows:
        row.tokens[:] %= 96
    config = TrainConfig(
        **{"max_steps": 4, "micro_batch": 2, "learning_rate": 5e-3, "save_every": 2},
        **{"keep_checkpoints": 2, "compute_dtype": "float32", "seed": 3},
    )
    model = attach(base, lora, key=jax.random.key(1))
    run, was = tmp_path / "run", losses(tmp_path / "run")
    adapter = arrays_of(load_adapter(run / "adapter", base))
    with pytest.raises(CheckpointError, match="packing: it has 'drawn', .* 'on'"):
        Trainer(model, rows, config, run, lora=lora).fit(resume=True)
    Trainer(model, rows, config, run, lora=lora, packing="drawn").fit(resume=True)
    now = losses(run)
    assert now.keys() == was.keys() == {1, 2, 3, 4}
    for step in (3, 4):  # in another program, which rounds elsewhere
        np.testing.assert_allclose(now[step], was[step], rtol=2e-6)
    again = arrays_of(load_adapter(run / "adapter", base))
    for new, old in zip(again, adapter, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)


def arrays_of(model: Any) -> list[np.ndarray]:
    return tiny.arrays(flatten(split(model)[1]))


def test_an_optimizers_state_of_no_version_is_told():
    state = trainer(Path("unused")).opt_state
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert older(state, shapes[:-1]) is None
    assert older(state, [*shapes[:-1], (9, 9)]) is None


def test_a_run_folder_that_is_taken_is_refused(done):
    out, run, _, _ = done
    with pytest.raises(OutputExistsError, match="resume"):
        trainer(out, run.config).fit()
    assert set(losses(out)) == {1, 2, 3, 4, 5, 6}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = dataclasses.replace(
        CONFIG, learning_rate=1e30, warmup_ratio=0.0, save_every=1, max_grad_norm=None
    )
    with pytest.raises(DivergedError, match=r"step \d: the loss is .*learning-rate"):
        trainer(tmp_path / "a", config).fit()
    assert not (tmp_path / "a" / "adapter").exists()


@pytest.mark.slow
def test_a_float16_run_whose_forward_pass_overflows_does_not_end_well(tmp_path):
    config = dataclasses.replace(CONFIG, compute_dtype="float16", max_steps=8)
    run = trainer(tmp_path / "a", config)
    # Norms so large that hidden states leave float16's range, whatever the loss scale.
    run.base = jax.tree.map(
        lambda x: x * 6000 if x.shape[-1:] == (64,) and x.dtype == "float16" else x,
        run.base,
    )
    with pytest.raises(DivergedError, match="step 5: the loss is nan.*bfloat16"):
        run.fit()
    assert not (tmp_path / "a" / "adapter").exists()


@pytest.mark.slow
def test_the_last_update_may_not_leave_an_adapter_that_is_not_finite(tmp_path):
    config = dataclasses.replace(
        CONFIG, learning_rate=3e38, warmup_ratio=0.0, max_steps=1, weight_decay=10.0
    )
    with pytest.raises(DivergedError, match="eval loss is|values that are not finite"):
        trainer(tmp_path / "a", config).fit()
    assert not (tmp_path / "a" / "adapter").exists()


def test_a_metrics_log_drops_what_a_resumed_run_takes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 3.0}] + [
        {"step": i, "loss": 1.0} for i in range(1, 5)
    ]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in lines) + '{"step": 5, "lo'
    )
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    log = MetricsLog(path, keep_until=2)
    log.write(step=3, loss=0.5)
    log.close()
    assert read_metrics(path) == [*lines[:3], {"step": 3, "loss": 0.5}]


def test_the_report_has_figures_curve_and_config(done, tmp_path):
    out = done[0]
    for name in ("metrics.jsonl",):
        (tmp_path / name).write_text((out / name).read_text())
    (tmp_path / "config.toml").write_text('model = "<tiny>"\n')
    page = write_report(tmp_path, {"loss": 1.5, "out": "<a>"}).read_text()
    assert "data:image/png;base64," in page
    assert "&lt;tiny&gt;" in page and "&lt;a&gt;" in page and "<tiny>" not in page
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_of_nothing_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_loss(tmp_path).exists()
