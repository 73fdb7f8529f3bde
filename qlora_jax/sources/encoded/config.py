"""Reads from config.json which form the linears of a folder are stored in.

Whatever changes what weights decode to is read here, or refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax.sources.encoded.awq import AWQ
from qlora_jax.sources.encoded.form import Form, Settings
from qlora_jax.sources.encoded.fp4 import FP4
from qlora_jax.sources.encoded.gptq import GPTQ
from qlora_jax.sources.encoded.packed import PACKED
from qlora_jax.sources.encoded.scaled import EIGHT_BITS, FP8


class Encoding(NamedTuple):
    """Says how the linears of a folder are stored.

    Attributes:
      method: The quant_method of config.json.
      forms: Forms that a weight may have.
      settings: What forms have to know.
      stacked: The form of the experts of a layer that are one tensor; None for none.
    """

    method: str
    forms: tuple[Form, ...]
    settings: Settings
    stacked: Form | None = None


def read_encoding(hf: Mapping[str, Any]) -> tuple[Encoding | None, list[str]]:
    """Reads config.json's quantization_config: (None where a folder has another form or
    none, problems).

    Args:
      hf: The object, whose fields are of the kinds that settings.py lists.
    """
    stored = hf.get("quantization_config") or {}
    read = METHODS.get(stored.get("quant_method"))
    if read is None:
        return None, []
    encoding, problems = read(stored)
    return encoding, [f"quantization_config: {problem}" for problem in problems]


def _refused(
    stored: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """Returns a sentence for each field that has a value other than the known ones."""
    return [
        f"{name} is {stored[name]!r}; known: {', '.join(map(str, values))}"
        for name, values in known.items()
        if stored.get(name) is not None and stored[name] not in values
    ]


def _fp8(stored: Mapping[str, Any]) -> tuple[Encoding, list[str]]:
    problems = _refused(
        stored,
        {
            "scale_fmt": ("float", "ue8m0"),
            "expert_dtype": ("fp8",),
        },
    )
    size = stored.get("weight_block_size")
    if size is not None and len(size) != 2:
        problems.append(f"weight_block_size is {size}, expected rows and columns")
    blocks = ((size[0], size[1]),) if size and not problems else ()
    return Encoding("fp8", (FP8,), Settings(blocks), FP8), problems


_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
"""Formats of compressed-tensors that are read."""

_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


def _compressed(stored: Mapping[str, Any]) -> tuple[Encoding, list[str]]:
    problems = _refused(
        stored,
        {
            "format": _FORMATS,
            "quantization_status": ("compressed",),
        },
    )
    if (stored.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        problems.append(
            "sparsity_config has a format other than dense, which is not read"
        )
    if (stored.get("transform_config") or {}).get("config_groups"):
        problems.append(
            "transform_config rotates activations, which is not computed here"
        )
    groups = stored.get("config_groups") or {}
    weights = [one for g in groups.values() if (one := g.get("weights")) is not None]
    if not weights:
        problems.append("config_groups says nothing of weights")
    blocks: dict[tuple[int, int], None] = {}
    for one in weights:
        problems += _refused(
            one,
            {"strategy": _STRATEGIES, "type": ("int", "float"), "num_bits": (4, 8)},
        )
        if len(size := one.get("block_structure") or ()) == 2:
            blocks[size[0], size[1]] = None
        if (one.get("group_size") or 0) > 0:
            blocks[1, one["group_size"]] = None
    for group in groups.values():
        problems += _refused(group, {"format": _FORMATS})
    bits = {
        one.get("num_bits") or 8: None for one in weights if one.get("type") != "float"
    }
    settings = Settings(tuple(blocks), tuple(bits))
    forms = (FP4, PACKED, EIGHT_BITS)
    return Encoding("compressed-tensors", forms, settings), problems


def _gptq(stored: Mapping[str, Any]) -> tuple[Encoding, list[str]]:
    own = "checkpoint_format" if stored.get("checkpoint_format") else "format"
    problems = _refused(
        stored,
        {"bits": (4, 8), own: ("gptq", "gptq_v2"), "pack_dtype": ("int32",)},
    )
    if stored.get("is_marlin_format"):
        problems.append("is_marlin_format is true, whose order of weights is not read")
    size = stored.get("group_size") or -1
    settings = Settings(((1, max(size, 0)),), shifted=stored.get(own) != "gptq_v2")
    return Encoding("gptq", (GPTQ,), settings), problems


def _awq(stored: Mapping[str, Any]) -> tuple[Encoding, list[str]]:
    own = "version" if stored.get("version") else "format"
    said = {**stored, own: str(stored.get(own) or "gemm").lower()}
    problems = _refused(said, {"bits": (4,), own: ("gemm",)})
    if stored.get("backend") == "llm-awq":
        problems.append("backend is 'llm-awq', whose order of weights is not read")
    if stored.get("zero_point") is False:
        problems.append("zero_point is false, which version gemm does not have")
    return Encoding("awq", (AWQ,), Settings()), problems


METHODS: dict[Any, Callable[[Mapping[str, Any]], tuple[Encoding, list[str]]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
"""quant_method -> what reads the rest of quantization_config."""
