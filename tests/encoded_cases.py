"""Folders as other libraries quantize them, and the dense ones that they stand for.

The packing is written anew here: goldens by the libraries themselves hold the decoding to
them (test_encoded.py), these hold everything else that is done with such a folder.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from qlora_jax import digests
from qlora_jax.sources.safetensors import DTYPES

FILE = "model.safetensors"
Entries = dict[str, np.ndarray]
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, with dtypes that its package lacks for numpy."""
    kinds, header, end = {d: name for name, d in DTYPES.items()}, {}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape)}
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _words(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Packs codes along the last axis, the first of them in the lowest bits."""
    each = 32 // bits
    padded = np.pad(codes, [(0, 0), (0, -codes.shape[1] % each)]).astype(np.uint32)
    apart = padded.reshape(len(codes), -1, each) << np.arange(
        0, 32, bits, dtype=np.uint32
    )
    return np.bitwise_or.reduce(apart, axis=-1).view(np.int32)


def _fp8(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    rows, columns = 24, 40  # which leave smaller blocks at the ends
    grid = tuple(
        -(-size // by) for size, by in zip(w.shape, (rows, columns), strict=True)
    )
    scale = np.random.default_rng(w.size).uniform(1e-3, 2e-3, grid).astype(np.float32)
    each = scale.repeat(rows, 0).repeat(columns, 1)[: w.shape[0], : w.shape[1]]
    codes = (w / each).astype(F8)
    scales = {"weight": codes, "weight_scale_inv": scale}
    return {**scales, "input_scale": np.ones(1, np.float32)}, codes.astype(
        np.float32
    ) * each


def _fp8_stacked(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    grid = w.shape[0], w.shape[1] // 4, w.shape[2] // 8
    scale = np.random.default_rng(w.size).uniform(1e-2, 2e-2, grid).astype(np.float32)
    each = scale.repeat(4, 1).repeat(8, 2)
    codes = (w / each).astype(F8)
    entries = {"": codes, "_scale_inv": scale}
    return entries, codes.astype(np.float32) * each


def _packed(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    groups = w.reshape(len(w), -1, 32)
    scale = (np.abs(groups).max(-1) / 7).astype(BF16)
    codes = np.round(groups / scale[..., None].astype(np.float32)).clip(-8, 7)
    dense = (codes * scale[..., None].astype(np.float32)).astype(BF16).reshape(w.shape)
    return {
        "weight_packed": _words(codes.reshape(w.shape) + 8),
        "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }, dense


def _nvfp4(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    groups, whole = w.reshape(len(w), -1, 16), np.float32(300)
    scale = (np.abs(groups).max(-1) / 6 * whole).astype(F8)
    each = (scale.astype(np.float32) / whole)[..., None]
    size = np.abs(groups / each)[..., None]
    codes = np.argmin(np.abs(size - values), -1)
    dense = np.where(groups < 0, -values[codes], values[codes]) * each
    codes = np.where(groups < 0, codes + 8, codes).reshape(w.shape).astype(np.uint8)
    return {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_global_scale": np.array([whole]),
    }, dense.astype(BF16).reshape(w.shape)


def _integers(w: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns codes (n, k), zero points and scales (n, groups), and what they stand for."""
    low, high = (
        np.stack([f(w[:, group == g], axis=1) for g in range(group.max() + 1)], axis=1)
        for f in (np.min, np.max)
    )
    scale = ((high - low) / 14).astype(np.float16)
    exact = scale.astype(np.float32)
    zeros = np.round(-low / exact).clip(1, 15)
    codes = (np.round(w / exact[:, group]) + zeros[:, group]).clip(0, 15)
    dense = (codes - zeros[:, group]) * exact[:, group]
    return codes, zeros, scale, dense.astype(np.float16)


def _gptq(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    group = np.random.default_rng(0).permutation(np.arange(w.shape[1]) // 32)
    codes, zeros, scale, dense = _integers(w, group)
    return {
        "qweight": np.ascontiguousarray(_words(codes).T),
        "qzeros": _words(zeros.T - 1),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": group.astype(np.int32),
    }, dense


def _awq(w: np.ndarray) -> tuple[Entries, np.ndarray]:
    codes, zeros, scale, dense = _integers(w, np.arange(w.shape[1]) // 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = (x.T.reshape(x.shape[1], -1, 8)[..., order] for x in (codes, zeros))
    return {
        "qweight": _words(codes.reshape(len(codes), -1)),
        "qzeros": _words(zeros.reshape(len(zeros), -1)),
        "scales": np.ascontiguousarray(scale.T),
    }, dense


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


FORMS: dict[
    str,
    tuple[dict[str, Any], Callable[[np.ndarray], tuple[Entries, np.ndarray]]],
] = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [24, 40], "ignored_layers": None},
        _fp8,
    ),
    "fp8_stacked": (
        {"quant_method": "fp8", "weight_block_size": [4, 8]},
        _fp8_stacked,
    ),
    "packed": (
        _compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32
        ),
        _packed,
    ),
    "nvfp4": (
        _compressed(
            "nvfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="tensor_group",
            group_size=16,
        ),
        _nvfp4,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        _gptq,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"},
        _awq,
    ),
}
"""Name -> quantization_config, and what makes of a weight its entries and what they mean."""


def folders(
    base: Path,
    out: Path,
    form: str,
    named: Callable[[str], str] = lambda name: name,
    ends: tuple[str, ...] = ("_proj.weight",),
) -> tuple[Path, Path]:
    """Writes a folder again with its linears in a form, and dense with the same values.

    Args:
      base: A dense folder.
      out: Two folders are made in it.
      form: One of FORMS.
      named: What the first of them calls a tensor.
      ends: Ends of the names of what is quantized.
    """
    config, encode = FORMS[form]
    stored: Entries = {}
    dense: Entries = {}
    out.mkdir(exist_ok=True)
    for name, w in load_file(base / FILE).items():
        dense[name], mine = w, named(name)
        if name.endswith(ends):
            entries, dense[name] = encode(w.astype(np.float32))
            stacked = form == "fp8_stacked"
            module = mine if stacked else mine.removesuffix("weight")
            stored |= {module + end: x for end, x in entries.items()}
        else:
            stored[mine] = w
    for part, tensors in (("encoded", stored), ("dense", dense)):
        shutil.copytree(base, out / part)
        for file in (out / part).glob("*.safetensors*"):
            file.unlink()
        (out / part / digests.NAME).unlink(missing_ok=True)
        write(out / part / FILE, tensors)
    where = out / "encoded" / "config.json"
    hf = json.loads(where.read_text()) | {"quantization_config": config}
    where.write_text(json.dumps(hf))
    return out / "encoded", out / "dense"
