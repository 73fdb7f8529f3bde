"""qlora merge: the folders it writes, and the error that it states."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import call

from qlora_jax.adapters import Adapter
from qlora_jax.adapters.algebra import scale
from qlora_jax.cli.main import main
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.read import read_adapter
from qlora_jax.sources.load import load
from qlora_jax.sources.save import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    model = tiny.adapted(tiny.quantized(), targets="q_proj,down_proj")
    save_model(tiny.quantized(), root / "base")
    adapter = Adapter.of(model)
    save_adapter(root / "a", adapter.lora, adapter.config)
    return root


def test_a_dense_merge_states_its_rounding(folders: Path, tmp_path: Path, capsys):
    figures = call(
        *(capsys, "merge", "--model", folders / "base", "--adapter", folders / "a"),
        *("--out", tmp_path / "m"),
    )
    assert 1e-3 < figures["relative_error"] < 2**-8  # of bfloat16
    assert figures["error_of_update"] > figures["relative_error"]
    assert "layers.1.mlp.down_proj" in figures["table"]
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert len(report["linears"]) == 4
    assert report["relative_error"] == figures["relative_error"]


def test_a_merge_that_float16_cannot_hold_is_refused_by_name(folders, tmp_path, capsys):
    adapter = read_adapter(folders / "a")
    far = scale(adapter, 1e7)
    save_adapter(tmp_path / "far", far.lora, far.config)
    flags = ["--model", folders / "base", "--adapter", tmp_path / "far"]
    out = tmp_path / "m"
    args = map(str, ["merge", *flags, "--out", out, "--dtype", "float16"])
    assert main(list(args)) == 2
    said = capsys.readouterr().err
    assert "layers.0.mlp.down_proj.weight: values beyond 65504" in said
    assert "bfloat16 or float32" in said and not out.exists()


@pytest.mark.slow
def test_a_4_bit_merge_comes_with_its_correction(folders, tmp_path: Path, capsys):
    figures = call(
        *(capsys, "merge", "--model", folders / "base", "--adapter", folders / "a"),
        *("--out", tmp_path / "m", "--requantize", "nf4", "--correction-rank", 16),
        *("--dtype", "float32"),
    )
    assert 0.05 < figures["relative_error"] < 0.2
    assert figures["corrected_error"] < 0.8 * figures["relative_error"]
    base, _ = load(tmp_path / "m", None, "float32")
    wanted = tiny.logits(
        load_adapter(folders / "a", load(folders / "base", None, "float32")[0]),
        tiny.tokens(),
    )

    def off(model) -> float:
        return float(jnp.linalg.norm(tiny.logits(model, tiny.tokens()) - wanted))

    assert off(load_adapter(tmp_path / "m" / "adapter", base)) < 0.9 * off(base)
    assert np.isfinite(off(base))


@pytest.mark.slow
def test_more_rounds_lose_less_with_the_correction_and_more_without(
    folders, tmp_path: Path, capsys
):
    args = ["merge", "--model", folders / "base", "--adapter", folders / "a"]
    args += ["--requantize", "nf4", "--correction-rank", 16, "--dtype", "float32"]
    one = call(capsys, *args, "--out", tmp_path / "1")
    more = ["--correction-iterations", 3, "--out", tmp_path / "3"]
    three = call(capsys, *args, *more)
    assert three["corrected_error"] < 0.98 * one["corrected_error"]
    assert three["relative_error"] > one["relative_error"]
    base, _ = load(tmp_path / "3", None, "float32")
    model = load_adapter(tmp_path / "3" / "adapter", base)
    wanted = tiny.adapted(tiny.quantized(), targets="q_proj,down_proj")
    off = tiny.logits(model, tiny.tokens()) - tiny.logits(wanted, tiny.tokens())
    assert np.linalg.norm(off) < np.linalg.norm(
        tiny.logits(base, tiny.tokens()) - tiny.logits(wanted, tiny.tokens())
    )
    # The adapter of one round does not fit the base of three.
    with pytest.raises(AdapterMismatchError, match="other 4-bit weights"):
        load_adapter(tmp_path / "1" / "adapter", base)


def test_a_correction_of_nothing_is_refused(folders: Path, tmp_path: Path, capsys):
    args = ["merge", "--model", folders / "base", "--adapter", folders / "a"]
    args += ["--out", tmp_path / "m", "--correction-rank", 4]
    assert main([str(arg) for arg in args]) == 2
    assert "--correction-rank goes with --requantize" in capsys.readouterr().err
    args[-2:] = ["--correction-iterations", 0]
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert "--correction-iterations goes with --correction-rank" in said
    assert "is 0, expected at least 1" in said
    assert not (tmp_path / "m").exists()
