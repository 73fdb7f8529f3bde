"""--lora.init pissa: the run saves the base it changed, and everything finds it there."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from command import call, refused

from qlora_jax.adapters import Adapter, LoRAConfig, attach, detach
from qlora_jax.cli.main import main
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.sources.load import load, original_kernels
from qlora_jax.sources.save import save_model
from qlora_jax.train.metrics import read_metrics

FLAGS = ["--train.micro-batch", "2", "--train.grad-accum", "1", "--lora.rank", "8"]
FLAGS += ["--train.compute-dtype", "float32", "--data.max-tokens", "64"]
FLAGS += ["--train.max-steps", "2", "--data.eval-rows", "2", "--lora.init", "pissa"]
FLAGS += ["--train.save-every", "1", "--lora.targets", "q_proj,down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder, rows, and what a run leaves behind, made without training."""
    root = tmp_path_factory.mktemp("pissa")
    dense = tiny.write_folder(root / "dense")
    tiny.write_jsonl(root / "rows.jsonl", tiny.sums(12))
    config = LoRAConfig(rank=8, targets="q_proj", init="pissa")
    model = attach(
        *(tiny.quantized(), config),
        key=jax.random.key(0),
        original=original_kernels(dense),
    )
    save_adapter(root / "run" / "adapter", Adapter.of(model).lora, config)
    save_model(detach(model), root / "run" / "base", source=dense)
    return root


@pytest.fixture(scope="module")
def trained(folders: Path) -> Path:
    args = ["--model", folders / "dense", "--data", folders / "rows.jsonl", "--out"]
    assert main(["train", *map(str, [*args, folders / "trained"]), *FLAGS]) == 0
    return folders / "trained"


def evaluate(folders: Path, model: Path, run: Path) -> list[object]:
    args = ["evaluate", "--model", model, "--adapter", run, "--dtype", "float32"]
    return [*args, "--data", folders / "rows.jsonl", "--data.max-tokens", 64]


@pytest.mark.slow
def test_the_run_saves_the_base_that_it_trains_on(trained: Path):
    run = trained
    base, _ = load(run / "base", dtype="float32")
    model = load_adapter(run, base)
    x, dense, plain = tiny.tokens(), tiny.decoder(), tiny.quantized()
    far = np.linalg.norm(tiny.logits(plain, x) - tiny.logits(dense, x))
    assert np.linalg.norm(tiny.logits(model, x) - tiny.logits(dense, x)) < far
    # What has no adapter is what it always is.
    for one, is_same in (("q_proj", False), ("k_proj", True)):
        codes = [getattr(m.layers.attn, one).quantized.codes for m in (base, plain)]
        assert np.array_equal(*codes) == is_same


@pytest.mark.slow
def test_a_run_that_moved_is_resumed_evaluated_and_merged(
    folders: Path, trained: Path, tmp_path: Path, capsys
):
    run, moved = trained, tmp_path / "moved"
    shutil.copytree(run, moved)
    before = evaluate(folders, folders / "dense", run)
    held = call(capsys, *before)
    assert held["base_folder"] == str(run.absolute() / "base")
    assert held["base"].startswith("nf4")
    # Back to the first step, with no base but the run's own.
    shutil.rmtree(moved / "checkpoints" / "2")
    shutil.rmtree(moved / "adapter")
    text = (moved / "config.toml").read_text()
    gone = text.replace(str(folders / "dense"), str(tmp_path / "gone"))
    assert gone != text
    (moved / "config.toml").write_text(gone)
    call(capsys, "train", "--resume", moved)
    rows = [read_metrics(x / "metrics.jsonl") for x in (run, moved)]
    losses = [[row["loss"] for row in one if "loss" in row] for one in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    after = call(capsys, *evaluate(folders, folders / "dense", moved))
    assert after["loss"] == held["loss"]
    assert after["base_folder"] == str(moved.absolute() / "base")
    own = call(capsys, *evaluate(folders, moved / "base", moved / "adapter"))
    assert own["loss"] == held["loss"]
    said = call(
        *(capsys, "merge", "--model", folders / "dense", "--adapter", moved),
        *("--out", tmp_path / "m", "--dtype", "float32"),
    )
    assert said["merged_onto"].endswith(str(moved / "base"))
    merged, _ = load(tmp_path / "m", dtype="float32")
    model = load_adapter(moved, load(moved / "base", dtype="float32")[0])
    x = tiny.tokens()
    np.testing.assert_allclose(tiny.logits(merged, x), tiny.logits(model, x), atol=1e-4)


def test_another_base_is_refused(folders: Path, tmp_path: Path, capsys):
    other = tiny.write_folder(tmp_path / "other", tiny.decoder(seed=1))
    said = refused(capsys, *evaluate(folders, other, folders / "run"))
    assert "was not made of --model" in said and "other weights" in said
    # Without the base beside it, the adapter fits no other 4-bit copy, nor the dense one.
    shutil.copytree(folders / "run" / "adapter", tmp_path / "run" / "adapter")
    alone = evaluate(folders, folders / "dense", tmp_path / "run")
    said = refused(capsys, *alone, "--quant.codebook", "nf4")
    assert "other 4-bit weights: the mean absmax of layers." in said
    assert "in base/ beside adapter/" in said
    said = refused(capsys, *alone, "--quant.codebook", "none")
    assert "principal part of the weights (init pissa)" in said
    base = folders / "run" / "base"
    held = call(capsys, *evaluate(folders, folders / "dense", folders / "run"))
    found = call(capsys, *evaluate(folders, base, tmp_path / "run"))
    assert found["loss"] == held["loss"]


def test_a_run_without_its_base_is_not_resumed(tmp_path: Path, capsys):
    (tmp_path / "config.toml").write_text('model = "gone"\n[lora]\ninit = "pissa"\n')
    assert "base is not there" in refused(capsys, "train", "--resume", tmp_path)


def test_what_does_not_go_with_pissa_is_said_at_once(folders, tmp_path, capsys):
    args = ["train", "--data", folders / "rows.jsonl", "--out", tmp_path / "o", *FLAGS]
    args += ["--model", folders / "run" / "base"]
    said = refused(
        *(capsys, *args, "--add-tokens", "<tool>", "--lora.bias", "all"),
        *("--lora.modules-to-save", "norm", "--quant.embedding", "4bit"),
        *("--quant.head", "int8"),
        *("--quant.codebook", "none"),
    )
    for flag in ("--add-tokens", "--lora.bias all", "--lora.modules-to-save norm"):
        assert flag in said
    for text in ("--quant.embedding", "--quant.head", "codebook none", "4-bit already"):
        assert text in said
    args[args.index("--out") + 1] = folders / "run"
    said = refused(capsys, *args, "--overwrite")
    assert "the run's own base would replace it" in said
    assert (folders / "run" / "base" / "config.json").exists()
    (tmp_path / "o" / "base").mkdir(parents=True)
    (tmp_path / "o" / "base" / "mine.txt").write_text("mine")
    args = ["train", "--data", folders / "rows.jsonl", "--out", tmp_path / "o", *FLAGS]
    said = refused(capsys, *args, "--model", folders / "dense", "--overwrite")
    assert "is no base of a run" in said
    assert (tmp_path / "o" / "base" / "mine.txt").exists()


def test_export_names_the_base_that_peft_must_open(folders, tmp_path: Path, capsys):
    run, out = folders / "run", tmp_path / "peft"
    args = ["export", "--model", folders / "dense", "--adapter", run, "--out", out]
    said = call(capsys, *args)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == said["base_folder"]
    assert Path(said["base_folder"]).samefile(run / "base")
    base, _ = load(said["base_folder"], dtype="float32")
    x = tiny.tokens()
    np.testing.assert_array_equal(
        tiny.logits(load_adapter(out, base), x), tiny.logits(load_adapter(run, base), x)
    )


@pytest.mark.slow
def test_a_4_bit_folder_and_its_original_do_as_well(
    folders, trained, tmp_path: Path, capsys
):
    save_model(tiny.quantized(), tmp_path / "q", source=folders / "dense")
    args = ["train", "--data", folders / "rows.jsonl", "--out", tmp_path / "o", *FLAGS]
    args += ["--model", tmp_path / "q", "--original", folders / "dense"]
    call(capsys, *args)
    paths = [x / "base" / "model.safetensors" for x in (trained, tmp_path / "o")]
    one, other = (path.read_bytes() for path in paths)
    assert one == other
    # A new run over it replaces its base.
    call(capsys, *args, "--overwrite", "--lora.rank", 2)
    assert paths[1].read_bytes() != other
    model = load_adapter(tmp_path / "o", load(tmp_path / "o" / "base")[0])
    assert detach(model).compute_dtype == "bfloat16"
