"""Makes tests/golden/encoded: weights as other libraries store them, and what they decode to.

Run in a venv with torch and transformers (scripts/interop_venv makes one), to which
compressed-tensors 0.20 and gptqmodel 7.7 were added:

    python -m scripts.make.golden_encoded
    python -m scripts.make.golden_encoded compressed_order  # compressed-tensors 0.11

Each file has a weight's entries as a module `m`, or those of experts in one tensor as
`m.weight` and `m.weight_scale_inv` with three axes, `decoded`, which its library made of them,
and as metadata the quantization_config of a folder that has such weights.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "encoded"
Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]
"""A name, the quantization_config, the entries and what they decode to."""


def fp8() -> Iterator[Case]:
    """Yields FP8 weights, decoded by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    blocks = config | {"weight_block_size": [16, 32]}
    random = torch.Generator().manual_seed(0)
    w = torch.randn(48, 64, generator=random)
    grid = torch.rand(3, 2, generator=random) + 0.01
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    powers = (grid.log2().round()).exp2()
    per_32 = torch.randint(110, 130, (48, 2), generator=random, dtype=torch.uint8)
    cases = {
        "blocks": (blocks, w.to(e4m3), grid),
        "blocks_bfloat16": (blocks, w.to(e4m3), grid.bfloat16()),
        "blocks_e5m2": (blocks, w.to(e5m2), grid),
        "blocks_e8m0": (
            blocks | {"scale_fmt": "ue8m0"},
            w.to(e4m3),
            powers.to(torch.float8_e8m0fnu),
        ),
        "rows_of_32": (config | {"weight_block_size": [1, 32]}, w.to(e4m3), per_32),
        "rows": (config, w.to(e4m3), torch.rand(48, 1, generator=random) + 0.01),
        "whole": (
            config | {"activation_scheme": "static", "weight_block_size": None},
            w.to(e4m3),
            torch.tensor(0.37),
        ),
        "experts": (
            blocks,
            torch.randn(3, 48, 64, generator=random).to(e4m3),
            torch.rand(3, 3, 2, generator=random) + 0.01,
        ),
        "experts_halves": (
            config,
            torch.randn(2, 48, 64, generator=random).to(e4m3),
            torch.rand(2, 2, 1, generator=random) + 0.01,
        ),
    }
    for name, (said, codes, scale) in cases.items():
        decoded = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        entries = {"weight": codes, "weight_scale_inv": scale}
        if name == "whole":
            entries["activation_scale"] = torch.tensor(1.0)
        yield f"fp8_{name}", said, entries, decoded


def compressed() -> Iterator[Case]:
    """Yields weights of compressed-tensors, packed and decoded by it."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    random = torch.Generator().manual_seed(1)
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    float8 = {"num_bits": 8, "type": "float"}
    float4 = {"num_bits": 4, "type": "float", "symmetric": True}
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    pack, floats = "pack-quantized", "float-quantized"
    cases = {
        "int4": (pack, four | {"symmetric": True}, bf16),
        "int4_zeros": (pack, four | {"symmetric": False}, f16),
        "int4_rows": (
            pack,
            {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
            f32,
        ),
        "int8": (pack, eight | {"symmetric": True}, bf16),
        "int8_plain": ("int-quantized", eight | {"symmetric": False}, f16),
        "float8": (floats, float8 | {"strategy": "channel"}, bf16),
        "float8_whole": (floats, float8 | {"strategy": "tensor"}, f32),
        "float8_blocks": (
            floats,
            float8 | {"strategy": "block", "block_structure": [16, 32]},
            bf16,
        ),
        "nvfp4": (
            "nvfp4-pack-quantized",
            float4 | {"strategy": "tensor_group", "group_size": 16},
            f32,
        ),
        "mxfp4": (
            "mxfp4-pack-quantized",
            float4 | {"strategy": "group", "group_size": 32},
            bf16,
        ),
    }
    for name, (form, args, dtype) in cases.items():
        n, k = (40, 72) if name in ("int4_rows", "float8_blocks") else (40, 64)
        w = torch.randn(n, k, generator=random)
        w += 0.3 * torch.rand(n, 1, generator=random)
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**args)
        )
        entries = {"weight": w.to(dtype)} | _scales(w, args, dtype)
        made = BaseCompressor.get_value_from_registry(form)
        entries = made.compress(entries, scheme)
        decoded = made.decompress(entries, scheme)["weight"]
        if args["type"] == "float":
            entries["input_global_scale"] = torch.tensor([2.0])
        group = {"targets": ["Linear"], "weights": args, "format": form}
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        }
        yield f"compressed_{name}", config, entries, decoded


def _scales(
    w: torch.Tensor, args: dict[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the scales, and zero points, that span the values of a weight."""
    n, k = w.shape
    rows, columns = {
        "tensor": (n, k),
        "channel": (1, k),
        "block": args.get("block_structure"),
    }.get(args["strategy"], (1, args.get("group_size")))
    padded = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    blocks = padded.reshape(-(-n // rows), rows, -(-k // columns), columns)
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    largest = torch.maximum(-low, high)
    if args["type"] == "int" and not args["symmetric"]:
        steps = (1 << args["num_bits"]) - 1
        scale = ((high - low) / steps).to(dtype)
        zero = (-low / scale.float()).round() - (steps + 1) // 2
        return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    if args["type"] == "int":
        scale = largest / ((1 << (args["num_bits"] - 1)) - 0.5)
    elif args["num_bits"] == 8:
        scale = largest / 448
    elif args["strategy"] == "group":
        scale = (largest / 6).log2().ceil().exp2()
    else:
        whole = (448 * 6 / largest.max()).reshape(1)
        scale = (largest / 6 * whole).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scale, "weight_global_scale": whole}
    if args["strategy"] == "tensor":
        scale = scale.reshape(1)
    return {"weight_scale": scale.to(dtype)}


def compressed_order() -> Iterator[Case]:
    """Yields a weight whose columns are in groups by g_idx: compressed-tensors 0.11 alone."""
    from compressed_tensors.compressors import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    random = torch.Generator().manual_seed(2)
    n, k, size = 40, 64, 16
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size}
    codes = torch.randint(-8, 8, (n, k), generator=random, dtype=torch.int8)
    scale = (torch.rand(n, k // size, generator=random) + 0.1).bfloat16()
    order = (torch.randperm(k, generator=random) // size).to(torch.int32)
    decoded = dequantize(codes, scale, None, QuantizationArgs(**args), g_idx=order)
    group = {"targets": ["Linear"], "weights": args | {"actorder": "group"}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    entries = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
        "weight_g_idx": order,
    }
    yield "compressed_int4_order", config, entries, decoded


def gptq() -> Iterator[Case]:
    """Yields weights of gptqmodel, packed and decoded by it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    random = torch.Generator().manual_seed(3)
    n, k = 64, 96
    for name, bits, size, version, act in (
        ("first", 4, 32, 1, False),
        ("second", 4, 32, 2, False),
        ("eight", 8, 32, 1, False),
        ("rows", 4, -1, 2, False),
        ("order", 4, 32, 1, True),
    ):
        columns = k if size < 0 else size
        made = TorchLinear(
            bits=bits,
            group_size=size,
            sym=False,
            desc_act=act,
            in_features=k,
            out_features=n,
            bias=False,
            pack_dtype=torch.int32,
            register_buffers=True,
        )
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = torch.randn(n, k, generator=random)
        groups, most = k // columns, (1 << bits) - 1
        # Zero points from 0 on: the first version takes one from whole words then.
        zeros = torch.randint(0, most + 1, (n, groups), generator=random)
        scales = torch.rand(n, groups, generator=random) * 8 / most + 0.01
        order = torch.arange(k) // columns
        if act:
            order = order[torch.randperm(k, generator=random)]
        made.pack(linear, scales, zeros.float(), order.to(torch.int32))
        if version == 1:
            settings = QuantizeConfig(bits=bits, group_size=size, sym=False)
            convert_gptq_v2_to_v1_format_module(made, settings)
        entries = {
            end: getattr(made, end).detach().clone()
            for end in ("qweight", "qzeros", "scales", "g_idx")
        }
        if version == 1:
            convert_gptq_v1_to_v2_format_module(made, bits, torch.int32)
        made.post_init()
        decoded = made.dequantize_weight().T
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": act,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        }
        if name == "first":  # as old files have it
            del entries["g_idx"], config["checkpoint_format"]
        yield f"gptq_{name}", config, entries, decoded


def awq() -> Iterator[Case]:
    """Yields weights of AWQ, packed and decoded by gptqmodel."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq

    random = torch.Generator().manual_seed(4)
    n, k = 64, 96
    for name, size in (("groups", 32), ("rows", -1)):
        groups = 1 if size < 0 else k // size
        codes, zeros = (
            torch.randint(0, 16, (rows, n), generator=random) for rows in (k, groups)
        )
        scales = (torch.rand(groups, n, generator=random) + 0.01).half()
        qweight, qzeros = pack_awq(codes, zeros, 4)
        decoded = dequantize_gemm(qweight, qzeros, scales, 4, k // groups).T
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": size,
            "version": "gemm",
        }
        entries = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        yield f"awq_{name}", config, entries, decoded


def main() -> None:
    """Writes the cases of the functions that are named, or of all but compressed_order."""
    OUT.mkdir(exist_ok=True)
    makers = {f.__name__: f for f in (fp8, compressed, gptq, awq)}
    named = {f.__name__: f for f in (*makers.values(), compressed_order)}
    for make in [named[name] for name in sys.argv[1:]] or makers.values():
        for name, config, entries, decoded in make():
            tensors = {f"m.{end}": x.contiguous() for end, x in entries.items()}
            tensors["decoded"] = decoded.contiguous()
            metadata = {"config": json.dumps(config)}
            save_file(tensors, OUT / f"{name}.safetensors", metadata)
            print(name, {end: tuple(x.shape) for end, x in entries.items()})


if __name__ == "__main__":
    main()
