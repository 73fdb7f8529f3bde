"""A GGUF file in place of a model folder, everywhere a base is asked for."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.cli.main import main
from qlora_jax.sources.load import original_kernels
from qlora_jax.sources.source import open_source

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the package gguf", allow_module_level=True)

from qlora_jax.sources.gguf.write import write_gguf

FOLDER = Path(qlora.__file__).parent / "assets" / "base"  # has a real tokenizer


@pytest.fixture(scope="module")
def folder() -> Path:
    return FOLDER


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(FOLDER, out, "f32")
    return out


@pytest.mark.slow
def test_it_loads_as_the_folder_does(folder: Path, file: Path):
    ours, tokenizer = qlora.load(folder, dtype="float32")
    theirs, other = qlora.load(file, dtype="float32")
    for a, b in zip(tiny.frozen(theirs), tiny.frozen(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    assert theirs.config == ours.config
    text = "the quick brown fox, 1234"
    assert other.encode(text) == tokenizer.encode(text)
    tokens = jnp.asarray([tokenizer.encode(text)])
    assert np.isfinite(tiny.logits(theirs, tokens)).all()


def test_its_linears_are_read_one_by_one(folder: Path, file: Path):
    assert "model.layers.0.self_attn.q_proj.weight" in open_source(file).tensors
    np.testing.assert_array_equal(
        original_kernels(file)("layers.attn.q_proj", (1,)),
        original_kernels(folder)("layers.attn.q_proj", (1,)),
    )


@pytest.mark.slow
def test_quantizing_a_file_writes_a_folder_with_its_tokenizer(
    file: Path, tmp_path: Path, capsys
):
    args = ["quantize", "--model", str(file), "--out", str(tmp_path / "q")]
    assert main(args) == 0, capsys.readouterr().err
    model, tokenizer = qlora.load(tmp_path / "q")
    _, original = qlora.load(file)
    assert tokenizer.encode("abc") == original.encode("abc")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (original.bos_id, original.eos_ids)
    assert tokenizer.chat_template == original.chat_template
    assert json.loads((tmp_path / "q" / "config.json").read_text())["model_type"] == (
        "llama"
    )
