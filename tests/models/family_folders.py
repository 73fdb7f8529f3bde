"""Tiny models of every family, as folders that transformers saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from models import family_cases as cases
from safetensors.numpy import save_file

import qlora_jax as qlora
from qlora_jax.models import Decoder


def read(case: str, golden: Callable[[str], Path]) -> dict[str, Any]:
    """Returns a golden's arrays, with what transformers saved as an object."""
    with np.load(golden(f"families/{case}.npz")) as arrays:
        made = dict(arrays)
    return made | {"saved": json.loads(made["saved"].tobytes())}


def load(
    case: str, made: dict[str, Any], folder: Path, quant: Any = None, **tables: Any
) -> Decoder:
    """Writes the case's folder, as transformers saves it, and loads it."""
    (folder / "config.json").write_text(json.dumps(made["saved"]["config"]))
    shapes = made["saved"]["tensors"].items()
    tensors = {name: cases.weight(case, name, tuple(shape)) for name, shape in shapes}
    save_file(tensors, folder / "model.safetensors")
    return qlora.load(folder, quant, dtype="float32", **tables)[0]
