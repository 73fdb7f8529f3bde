"""Tiny models of every family, as folders that transformers saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from models import family_cases as cases
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from pallas_kernels.formats import FORMATS
from qlora_jax.models import Decoder


def read(case: str, golden: Callable[[str], Path]) -> dict[str, Any]:
    """Returns a golden's arrays, with what transformers saved as an object."""
    with np.load(golden(f"families/{case}.npz")) as arrays:
        made = dict(arrays)
    return made | {"saved": json.loads(made["saved"].tobytes())}


def write(case: str, made: dict[str, Any], folder: Path) -> None:
    """Writes the case's folder, as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made["saved"]["config"]))
    shapes = made["saved"]["tensors"].items()
    tensors = {name: cases.weight(case, name, tuple(shape)) for name, shape in shapes}
    save_file(tensors, folder / "model.safetensors")


def load(
    case: str, made: dict[str, Any], folder: Path, quant: Any = None, **tables: Any
) -> Decoder:
    """Writes the case's folder, and loads it."""
    write(case, made, folder)
    return qlora.load(folder, quant, dtype="float32", **tables)[0]


def in_mxfp4(dense: Path, out: Path) -> Path:
    """Writes a folder of gpt-oss again with its experts in MXFP4, as OpenAI has it."""
    out.mkdir()
    tensors = {}
    for name, array in load_file(dense / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = array
            continue
        packed = [FORMATS["mxfp4"].quantize(jnp.asarray(one.T)) for one in array]
        entries = [one.storage(name) for one in packed]
        tensors |= {key: np.stack([one[key] for one in entries]) for key in entries[0]}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"} | {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
