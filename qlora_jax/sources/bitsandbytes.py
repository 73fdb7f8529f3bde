"""Packed weights in a model's folder: their entries, and what config.json says of them.

4-bit linears are stored as bitsandbytes and transformers have them. An embedding or head in
int8 has the keys of bitsandbytes' Linear8bitLt (pallas_kernels/formats/int8_rows.py). No other
tool looks for them beside 4-bit linears, and transformers would take the codes for values.
So config.json names a quant_method of our own, which has bitsandbytes' settings inside:
others then find packed linears where they expect dense ones, and stop. The same holds of a
folder with linears in two formats, such as MXFP4 experts beside 4-bit attention, and of one
with such experts of another family than gpt-oss.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from pallas_kernels.formats import (
    FORMATS,
    FormatError,
    Int8Rows,
    PackedWeight,
    QuantizedTensor,
    stored_format,
)
from pallas_kernels.formats.absmax4.codebook import CODEBOOKS
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import CheckpointError
from qlora_jax.sources.encoded.config import METHODS

W = TypeVar("W", bound=PackedWeight)

WITH_INT8 = "qlora_jax_int8_tables"
"""quant_method of a folder whose embedding or head is in int8."""


OF_TWO = "qlora_jax_two_formats"
"""quant_method of a folder with linears in MXFP4, and others in bitsandbytes' 4 bits or
dense, that no other tool opens."""

MXFP4 = "mxfp4"
"""quant_method of a folder with experts in MXFP4, and the key of it in a folder of ours."""

_NOT_MXFP4 = (
    *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
    *("model.embed_tokens", "lm_head"),
)
"""What config.json says is not in MXFP4, as gpt-oss's own does."""


def is_packed(keys: Collection[str], name: str) -> bool:
    """Whether a file with these keys has a linear packed, as transformers finds it."""
    form = stored_format(keys, name)
    return form is not None and form.LISTED_AS is None


def is_packed_table(keys: Collection[str], name: str) -> bool:
    """Whether a file with these keys has an embedding or head packed, as config.json lists."""
    form = stored_format(keys, name)
    return form is not None and form.LISTED_AS is not None


def known_as(keys: Collection[str], name: str) -> str | None:
    """Returns the quant_method of a folder whose linears are stored as this one; None of a
    dense one, and of what is in a format of our own."""
    form = stored_format(keys, name)
    return None if form is None else form.KNOWN_AS


def read(
    tensors: Mapping[str, np.ndarray], name: str, dtype: str = "float32"
) -> PackedWeight:
    """Reads a packed linear; decoding it gives the float32 values of the library that made
    it, exactly.

    Args:
      tensors: A state dict that has it, with bitsandbytes' keys or in MXFP4.
      name: The weight's key, such as 'model.layers.0.self_attn.q_proj.weight'.
      dtype: What it stands for, where its entries do not say.

    Raises:
      CheckpointError: a key is missing, or its entries are not what bitsandbytes writes.
    """
    form = stored_format(tensors, name)
    return _read(form or QuantizedTensor, tensors, name, dtype)


def mxfp4_shapes(shape: tuple[int, ...], stack: tuple[int, ...]) -> PackedWeight:
    """Returns a stack of weights in MXFP4 as shapes alone."""
    return FORMATS[MXFP4].abstract(shape, stack, dtype="bfloat16")


def read_int8(tensors: Mapping[str, np.ndarray], name: str, dtype: str) -> Int8Rows:
    """Reads an int8 embedding or head, which stands for one in `dtype`.

    Raises:
      CheckpointError: codes and scales do not belong together.
    """
    return _read(Int8Rows, tensors, name, dtype)


def _read(form: type[W], tensors: Mapping[str, np.ndarray], name: str, dtype: str) -> W:
    try:
        return form.from_storage(tensors, name, dtype)
    except FormatError as error:
        raise CheckpointError(str(error)) from None


def linears_config(hf: dict[str, Any]) -> dict[str, Any] | None:
    """Returns bitsandbytes' part of config.json's quantization_config; None without one."""
    stored = hf.get("quantization_config")
    if stored is not None and stored.get("quant_method") in (WITH_INT8, OF_TWO):
        return stored.get("linears")
    return None if stored is not None and mxfp4_config(hf) is stored else stored


def mxfp4_config(hf: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what config.json's quantization_config says of MXFP4; None if nothing."""
    stored = hf.get("quantization_config") or {}
    return stored if stored.get("quant_method") == MXFP4 else stored.get(MXFP4)


def int8_tables(hf: dict[str, Any]) -> list[str]:
    """Returns the modules that config.json says are in int8."""
    stored = hf.get("quantization_config") or {}
    return stored.get("int8_tables", []) if linears_config(hf) is not stored else []


def folder_config(
    linears: Mapping[str, dict[str, Any]],
    tables: Mapping[str, list[str]],
    own: bool = False,
) -> dict[str, Any] | None:
    """Returns the quantization_config of a folder; None where all is dense.

    Args:
      linears: What it says of linears, by the quant_method that their format is KNOWN_AS.
      tables: Modules under the key that their format is LISTED_AS.
      own: Whether linears are stored under names that no other tool looks for.
    """
    if not tables and len(linears) < 2 and not own:
        return next(iter(linears.values()), None)
    mxfp4 = {MXFP4: linears[MXFP4]} if MXFP4 in linears else {}
    method = WITH_INT8 if tables else OF_TWO
    bnb = linears.get("bitsandbytes")
    return {"quant_method": method, **tables, **mxfp4, "linears": bnb}


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
            f"quantization_config has quant_method {method!r}; known: bitsandbytes with "
            f"load_in_4bit, mxfp4, {', '.join(METHODS)}"
        ]
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if kind not in CODEBOOKS:
        return None, [f"bnb_4bit_quant_type is {kind!r}; known: {', '.join(CODEBOOKS)}"]
    double = bool(stored.get("bnb_4bit_use_double_quant", False))
    return QuantConfig(codebook=kind, double_quant=double), []


def quantization_config(
    w: PackedWeight, compute_dtype: str, skip: list[str] | None = None
) -> dict[str, Any]:
    """Returns the quantization_config that transformers writes for such weights.

    Args:
      w: One of them, in a format that transformers knows.
      compute_dtype: Its name.
      skip: Names of modules that stay dense, beside embeddings and head.
    """
    if w.KNOWN_AS == MXFP4:
        return w.describe() | {"modules_to_not_convert": list(_NOT_MXFP4)}
    said = w.describe() | {
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
    }
    return dict(sorted(said.items()))
