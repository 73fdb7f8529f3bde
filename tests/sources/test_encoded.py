"""Folders that other libraries quantized: each weight is decoded as its library decodes it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from qlora_jax.sources.encoded import join, read_encoding
from qlora_jax.sources.safetensors import Checkpoint

FILE = "model.safetensors"
GOLDEN = Path(__file__).parents[1] / "golden" / "encoded"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def said(path: Path) -> dict:
    """Returns the quantization_config that goes with a golden file."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["config"])


def opened(folder: Path, config: dict) -> Checkpoint:
    encoding, problems = read_encoding({"quantization_config": config})
    assert encoding is not None and not problems
    checkpoint = Checkpoint(folder)
    join(checkpoint, encoding)
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_a_weight_decodes_to_what_its_library_makes_of_it(case, tmp_path):
    shutil.copy(GOLDEN / f"{case}.safetensors", tmp_path / FILE)
    checkpoint = opened(tmp_path, said(tmp_path / FILE))
    assert checkpoint.keys() == {"m.weight", "decoded"}
    want, info = checkpoint["decoded"], checkpoint.infos["m.weight"]
    got = checkpoint["m.weight"]
    assert (
        (info.shape, info.dtype) == (got.shape, got.dtype) == (want.shape, want.dtype)
    )
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
