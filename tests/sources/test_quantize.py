"""A 4-bit copy made tensor by tensor: the same bytes as by way of the whole model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import CheckpointError, OutputExistsError
from qlora_jax.sources.load import load
from qlora_jax.sources.quantize import quantize_folder
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.save import save_model
from qlora_jax.sources.source import open_source


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("quant", "more"),
    [
        (QuantConfig(), {}),
        (QuantConfig(codebook="fp4", block_size=32, double_quant=False), {}),
        (QuantConfig(), {"embedding": "int8", "head": "int8"}),
        (QuantConfig(), {"dtype": "float32", "shard_bytes": 20_000}),
    ],
    ids=["nf4", "fp4", "int8 tables", "shards"],
)
def test_the_bytes_are_those_of_the_model_saved(tmp_path: Path, quant, more):
    base = tiny.write_folder(tmp_path / "base")
    shards = {"shard_bytes": more.pop("shard_bytes")} if "shard_bytes" in more else {}
    model, _ = load(base, quant, **more)
    whole = save_model(model, tmp_path / "whole", source=base, **shards)
    made = quantize_folder(
        open_source(base), tmp_path / "made", quant, **more, **shards
    )
    assert made["bytes"] == whole["bytes"]
    assert files(tmp_path / "made") == files(tmp_path / "whole")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > bool(shards)


def test_nothing_is_written_of_weights_that_cannot_be_used(tmp_path: Path):
    base = tiny.write_folder(tmp_path / "base")
    tensors = dict(Checkpoint(base))
    bad = [name for name in tensors if name.endswith(("up_proj.weight", "norm.weight"))]
    for name in bad[:2]:
        tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="unusable weights") as caught:
        quantize_folder(open_source(base), tmp_path / "made", QuantConfig())
    assert all(name in str(caught.value) for name in bad[:2])
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path):
    base = tiny.write_folder(tmp_path / "base")
    with pytest.raises(OutputExistsError, match="is not empty"):
        quantize_folder(open_source(base), base, QuantConfig())
    other = dataclasses.replace(QuantConfig(), codebook="fp4")
    quantize_folder(open_source(base), tmp_path / "q", QuantConfig())
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_folder(open_source(tmp_path / "q"), tmp_path / "r", other)
