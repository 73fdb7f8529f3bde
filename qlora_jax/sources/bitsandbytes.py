"""bitsandbytes' tensors: its state-dict keys to quantized ones and back.

Keys of a weight P: `P` (packed bytes, in any storage dtype), `P.absmax`, `P.quant_map`,
with double quantization `P.nested_absmax` and `P.nested_quant_map`, and
`P.quant_state.bitsandbytes__nf4`, JSON as bytes.
Source: bitsandbytes functional.py, QuantState.as_dict and from_dict.

An embedding or head in int8 has the keys of bitsandbytes' Linear8bitLt: `M.weight`, int8
codes, and `M.SCB`, the float32 absmax of each row; a value is code * SCB / 127. No other
tool looks for them beside 4-bit linears, and transformers would take the codes for values.
So config.json names a quant_method of our own, which has bitsandbytes' settings inside:
others then find packed linears where they expect dense ones, and stop.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout
from pallas_kernels.codebook import (
    ABSMAX_BLOCK_SIZE,
    CODEBOOKS,
    Codebook,
    dynamic_map,
    values,
)
from pallas_kernels.layout import QuantizedTensor
from qlora_jax.errors import CheckpointError
from qlora_jax.quant import Int8Rows, QuantConfig
from qlora_jax.quant.config import BLOCK_SIZES
from qlora_jax.quant.int8 import LEVELS

logger = logging.getLogger(__name__)

_STATE = ".quant_state.bitsandbytes__"
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
WITH_INT8 = "qlora_jax_int8_tables"
"""quant_method of a folder whose embedding or head is in int8."""


def is_part(name: str) -> bool:
    """Whether a key belongs to another key's quantized weight."""
    return name.endswith(SUFFIXES) or _STATE in name


def weight_of(name: str) -> str:
    """Returns the key of the weight that a key belongs to; of a weight, itself."""
    if _STATE in name:
        return name.partition(_STATE)[0]
    for suffix in SUFFIXES[:-1]:
        name = name.removesuffix(suffix)
    stem = name.removesuffix(".SCB")
    return name if stem == name else f"{stem}.weight"


def renamed(name: str, weight: str) -> str:
    """Returns the key that a part has when its weight is called `weight`."""
    before = weight_of(name)
    return (
        scales_name(weight) if name.endswith(".SCB") else weight + name[len(before) :]
    )


def scales_name(name: str) -> str:
    """Returns the key of an int8 weight's row scales."""
    return name.removesuffix(".weight") + ".SCB"


def read_int8(tensors: Mapping[str, np.ndarray], name: str, dtype: str) -> Int8Rows:
    """Reads an int8 embedding or head, which stands for one in `dtype`.

    Raises:
      CheckpointError: codes and scales do not belong together.
    """
    codes, absmax = _get(tensors, name), _get(tensors, scales_name(name))
    if codes.dtype != np.int8 or absmax.dtype != np.float32:
        raise CheckpointError(
            f"{name} is {codes.dtype} and {scales_name(name)} {absmax.dtype}, expected "
            "int8 and float32"
        )
    if absmax.shape != codes.shape[:1]:
        raise CheckpointError(
            f"{scales_name(name)} has shape {absmax.shape}, expected one a row of "
            f"{codes.shape}"
        )
    if not (np.isfinite(absmax).all() and codes.min() >= -LEVELS):
        raise CheckpointError(f"{name} has a code of -128, or NaN or Inf in its scales")
    return Int8Rows(codes=jnp.asarray(codes), absmax=jnp.asarray(absmax), dtype=dtype)


def write_int8(q: Int8Rows, name: str) -> dict[str, np.ndarray]:
    """Writes an int8 embedding or head."""
    return {name: np.asarray(q.codes), scales_name(name): np.asarray(q.absmax)}


def read(tensors: Mapping[str, np.ndarray], name: str) -> QuantizedTensor:
    """Reads one weight; dequantizing it gives bitsandbytes' float32 values exactly.

    Args:
      tensors: A state dict with bitsandbytes' keys.
      name: Of the weight, such as 'model.layers.0.self_attn.q_proj.weight'.

    Returns:
      The tensor, in the layout its shape wants.

    Raises:
      CheckpointError: a key is missing, or the state is not one we know.
    """
    kind, state = _read_state(tensors, name)
    shape = tuple(state["shape"])
    block_size = int(state["blocksize"])
    table = _get(tensors, f"{name}.quant_map")
    if not np.array_equal(table, values(kind)):
        raise CheckpointError(f"{name}: its quant_map is not that of {kind}")
    where = layout.choose_layout(shape, block_size)
    packed = np.ascontiguousarray(_get(tensors, name)).reshape(-1).view(np.uint8)
    size = -(-int(np.prod(shape)) // 2)
    if packed.size < size:
        raise CheckpointError(
            f"{name}: {packed.size} bytes, shape {shape} needs {size}"
        )
    absmax = _get(tensors, f"{name}.absmax")
    blocks = -(-int(np.prod(shape)) // block_size)
    if absmax.size != blocks:
        raise CheckpointError(f"{name}: {absmax.size} absmax values, expected {blocks}")
    return QuantizedTensor(
        codes=jnp.asarray(layout.from_bitsandbytes(packed[:size], where, shape)),
        **_read_absmax(tensors, name, state, absmax.reshape(-1)),
        shape=shape,
        block_size=block_size,
        codebook=kind,
        layout=where,
        dtype=state["dtype"],
    )


def _read_absmax(
    tensors: Mapping[str, np.ndarray], name: str, state: dict, absmax: np.ndarray
) -> dict[str, Any]:
    if "nested_offset" not in state:
        return {"absmax": jnp.asarray(absmax.astype(np.float32))}
    scale = _get(tensors, f"{name}.nested_absmax").astype(np.float32).reshape(-1)
    table = _get(tensors, f"{name}.nested_quant_map")
    for key, kinds in (("nested_offset", (int, float)), ("nested_blocksize", int)):
        if not isinstance(state.get(key), kinds) or (key[7] == "b" and state[key] < 1):
            raise CheckpointError(f"{name}: its {key} is {state.get(key)!r}")
    offset = np.float32(state["nested_offset"])
    nested_block = state["nested_blocksize"]
    scales = -(-absmax.size // nested_block)
    if scale.size != scales:
        raise CheckpointError(
            f"{name}: {scale.size} nested_absmax values, expected {scales}"
        )
    if np.array_equal(table, dynamic_map()) and nested_block == ABSMAX_BLOCK_SIZE:
        return {
            "absmax_codes": jnp.asarray(absmax),
            "absmax_scale": jnp.asarray(scale),
            "absmax_offset": jnp.asarray(offset),
        }
    # Made with another map (old versions differ in last bits): only decoding it here
    # keeps its values exactly.
    logger.warning("%s: uncommon nested_quant_map; absmax is kept as float32", name)
    spread = np.repeat(scale, nested_block)[: absmax.size]
    return {"absmax": jnp.asarray(table[absmax] * spread + offset)}


def write(q: QuantizedTensor, name: str) -> dict[str, np.ndarray]:
    """Writes one weight as bitsandbytes would save it.

    Args:
      q: One tensor, not a stack.
      name: Of the weight.

    Returns:
      State-dict entries, packed weight as uint8 (bytes, 1).
    """
    packed = layout.to_bitsandbytes(np.asarray(q.codes), q.layout, q.shape)
    state: dict[str, Any] = {
        "quant_type": q.codebook,
        "blocksize": q.block_size,
        "dtype": q.dtype,
        "shape": list(q.shape),
    }
    entries = {
        name: packed.reshape(-1, 1),
        f"{name}.quant_map": values(q.codebook),
    }
    if q.double_quant:
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(cast(Any, q.absmax_offset)),
        }
        entries[f"{name}.absmax"] = np.asarray(q.absmax_codes)
        entries[f"{name}.nested_absmax"] = np.asarray(q.absmax_scale)
        entries[f"{name}.nested_quant_map"] = dynamic_map()
    else:
        entries[f"{name}.absmax"] = np.asarray(q.absmax)
    text = json.dumps(state).encode()
    entries[f"{name}{_STATE}{q.codebook}"] = np.frombuffer(text, np.uint8)
    return entries


def _read_state(
    tensors: Mapping[str, np.ndarray], name: str
) -> tuple[Codebook, dict[str, Any]]:
    for kind in CODEBOOKS:
        if f"{name}{_STATE}{kind}" in tensors:
            text = np.asarray(tensors[f"{name}{_STATE}{kind}"]).tobytes()
            break
    else:
        raise CheckpointError(f"{name}: no {_STATE[1:]}* entry for a known codebook")
    try:
        state = json.loads(text)
        missing = {"shape", "blocksize", "dtype", "quant_type"} - state.keys()
    except (ValueError, AttributeError):
        raise CheckpointError(f"{name}: its quant_state is not JSON") from None
    if missing:
        raise CheckpointError(
            f"{name}: its quant_state lacks {', '.join(sorted(missing))}"
        )
    if state["blocksize"] not in BLOCK_SIZES:
        raise CheckpointError(f"{name}: its blocksize is {state['blocksize']!r}")
    if state["dtype"] not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"{name}: its dtype is {state['dtype']!r}")
    if not isinstance(state["shape"], list) or not all(
        type(i) is int and i > 0 for i in state["shape"]
    ):
        raise CheckpointError(f"{name}: its shape is {state['shape']!r}")
    return kind, state


def _get(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    return np.asarray(tensors[name])


def linears_config(hf: dict[str, Any]) -> dict[str, Any] | None:
    """Returns bitsandbytes' part of config.json's quantization_config; None without one."""
    stored = hf.get("quantization_config")
    if stored is not None and stored.get("quant_method") == WITH_INT8:
        return stored.get("linears")
    return stored


def int8_tables(hf: dict[str, Any]) -> list[str]:
    """Returns the modules that config.json says are in int8."""
    stored = hf.get("quantization_config") or {}
    return stored.get("int8_tables", []) if linears_config(hf) is not stored else []


def with_int8_tables(
    linears: dict[str, Any] | None, modules: list[str]
) -> dict[str, Any]:
    """Returns a quantization_config that says which modules are in int8 too."""
    return {"quant_method": WITH_INT8, "int8_tables": modules, "linears": linears}


def read_quantization_config(
    hf: dict[str, Any],
) -> tuple[QuantConfig | None, list[str]]:
    """Reads config.json's quantization_config: (None for a dense model, problems)."""
    stored = linears_config(hf)
    if stored is None:
        return None, []
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        method = stored.get("quant_method")
        return None, [
            f"quantization_config has quant_method {method!r}; only bitsandbytes with "
            "load_in_4bit can be opened"
        ]
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if kind not in CODEBOOKS:
        return None, [f"bnb_4bit_quant_type is {kind!r}; known: {', '.join(CODEBOOKS)}"]
    double = bool(stored.get("bnb_4bit_use_double_quant", False))
    return QuantConfig(codebook=kind, double_quant=double), []


def stored_block_size(tensors: Mapping[str, np.ndarray]) -> int:
    """Returns the block size of a folder's 4-bit weights, which config.json does not have.

    64 where no weight says it: reading the weights themselves finds what is wrong.
    """
    for name in tensors:
        if _STATE in name:
            try:
                size = json.loads(bytes(tensors[name]))["blocksize"]
            except (ValueError, KeyError, TypeError):
                break
            return size if size in BLOCK_SIZES else 64
    return 64


def quantization_config(
    q: QuantizedTensor, compute_dtype: str, skip: list[str] | None = None
) -> dict[str, Any]:
    """Returns the quantization_config that transformers writes for such weights.

    Args:
      q: One of them.
      compute_dtype: Its name.
      skip: Names of modules that stay dense, beside embeddings and head.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": q.codebook,
        "bnb_4bit_use_double_quant": q.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
