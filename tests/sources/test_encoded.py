"""Folders that other libraries quantized: each weight is decoded as its library decodes it,
and the rest of the library takes it for a dense one."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from encoded_cases import FILE, FORMS, folders, write
from models import family_folders
from safetensors import safe_open

import qlora_jax as qlora
from qlora_jax.adapters import Adapter
from qlora_jax.cli.main import main
from qlora_jax.errors import CheckpointError
from qlora_jax.exchange.merge import Merging, merge_folder
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.sources.encoded import join, read_encoding
from qlora_jax.sources.load import original_kernels
from qlora_jax.sources.quantize import quantize_folder
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.source import open_source

GOLDEN = Path(__file__).parents[1] / "golden" / "encoded"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
NF4 = qlora.QuantConfig()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("dense") / "base")


def said(case: str) -> dict[str, Any]:
    """Returns the quantization_config that goes with a golden file."""
    with safe_open(GOLDEN / f"{case}.safetensors", "numpy") as file:
        return json.loads(file.metadata()["config"])


def opened(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Opens a folder of a single module, with the entries of its weight put together."""
    encoding, problems = read_encoding({"quantization_config": config})
    assert encoding is not None and not problems
    checkpoint = Checkpoint(folder)
    join(checkpoint, encoding)
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_a_weight_decodes_to_what_its_library_makes_of_it(case, tmp_path):
    shutil.copy(GOLDEN / f"{case}.safetensors", tmp_path / FILE)
    checkpoint = opened(tmp_path, said(case))
    assert checkpoint.keys() == {"m.weight", "decoded"}
    want, info = checkpoint["decoded"], checkpoint.infos["m.weight"]
    got = checkpoint["m.weight"]
    assert (info.shape, info.dtype) == (want.shape, want.dtype)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def in_4_bits(folder: Path) -> bytes:
    """Returns the weights of a folder, quantized tensor by tensor."""
    out = folder.parent / f"{folder.name} in 4 bits"
    quantize_folder(open_source(folder), out, NF4)
    return (out / FILE).read_bytes()


@pytest.mark.parametrize("form", [f for f in FORMS if f != "fp8_stacked"])
def test_everything_takes_such_a_folder_for_the_dense_one(form, base, tmp_path, capsys):
    encoded, dense = folders(base, tmp_path, form)
    assert in_4_bits(encoded) == in_4_bits(dense)
    configs = (tmp_path / f"{x} in 4 bits/config.json" for x in ("encoded", "dense"))
    assert len({path.read_text() for path in configs}) == 1
    for index in (0, 1):
        kernels = (
            original_kernels(folder)("layers.mlp.down_proj", (index,))
            for folder in (encoded, dense)
        )
        np.testing.assert_array_equal(next(kernels), next(kernels))
    assert open_source(encoded).stored is None
    assert main(["inspect", str(encoded)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dtype"] == "float32"
    assert found["quantization"].startswith("float32 (7 tensors), ")
    assert found["quantization"].endswith(" (14 tensors)")
    assert sum(found["bytes_by_part"].values()) == found["bytes"]
    assert any("14 in " in note for note in found["notes"])
    left_out = [note for note in found["notes"] if "input_scale (14 tensors)" in note]
    assert len(left_out) == (form == "fp8")


def test_it_loads_dense_and_merges_into_a_dense_folder(base, tmp_path, caplog):
    encoded, dense = folders(base, tmp_path, "fp8")
    one, other = (qlora.load(path, dtype="float32")[0] for path in (encoded, dense))
    assert caplog.text.count("quant_method fp8: 14 in FP8") == 1
    assert one.config == other.config
    for x, y in zip(tiny.frozen(one), tiny.frozen(other), strict=True):
        np.testing.assert_array_equal(x, y)
    adapter = Adapter.of(tiny.adapted(tiny.decoder()))
    save_adapter(tmp_path / "adapter", adapter.lora, adapter.config)
    merged = []
    for folder in (encoded, dense):
        out = tmp_path / f"{folder.name} merged"
        merge_folder(open_source(folder), tmp_path / "adapter", out, Merging())
        merged.append([(out / name).read_bytes() for name in (FILE, "config.json")])
    assert merged[0] == merged[1] and b"quantization_config" not in merged[0][1]


def test_experts_and_wrapped_models_have_such_weights_too(golden, base, tmp_path):
    mixture = tmp_path / "mixture"
    family_folders.write("mixtral", family_folders.read("mixtral", golden), mixture)
    ends = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    encoded, dense = folders(mixture, tmp_path / "m", "fp8", ends=ends)
    assert in_4_bits(encoded) == in_4_bits(dense)
    mixture = tmp_path / "stacked"
    case = "gemma4_text_moe"
    family_folders.write(case, family_folders.read(case, golden), mixture)
    ends = ("experts.gate_up_proj", "experts.down_proj")
    encoded, dense = folders(mixture, tmp_path / "s", "fp8_stacked", ends=ends)
    assert in_4_bits(encoded) == in_4_bits(dense)
    tensors = open_source(encoded).tensors
    name = "model.layers.1.experts.3.down_proj.weight"
    assert tensors.stored(name)[0] == "FP8" and "experts together" in tensors.notes[0]
    encoded, dense = folders(base, tmp_path / "w", "gptq", "language_model.{}".format)
    inner = json.loads((encoded / "config.json").read_text())
    outer = {"quantization_config": inner.pop("quantization_config")}
    outer |= {"model_type": "llava", "text_config": inner}
    (encoded / "config.json").write_text(json.dumps(outer))
    assert in_4_bits(encoded) == in_4_bits(dense)


def renewed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    return lambda entries: entries | {name: change(np.array(entries[name]))}


def without(name: str) -> Any:
    return lambda entries: {k: v for k, v in entries.items() if k != name}


def filled(value: Any) -> Any:
    def fill(x: np.ndarray) -> np.ndarray:
        x[..., -1] = value
        return x

    return fill


DAMAGED = {
    "no scale": ("fp8_blocks", without("weight_scale_inv"), "m.weight has no scale"),
    "NaN": (
        "fp8_blocks",
        renewed("weight_scale_inv", filled(np.nan)),
        "m.weight_scale_inv has NaN or Inf values",
    ),
    "blocks": (
        "fp8_blocks",
        renewed("weight_scale_inv", lambda x: x[:2]),
        r"m.weight_scale_inv has shape \(2, 2\), which does not fit a weight of shape "
        r"\(48, 64\).*16 x 32",
    ),
    "uneven stack": (
        "fp8_experts",
        renewed("weight_scale_inv", lambda x: x.repeat(3, 1)[:, :5]),
        r"m.weight_scale_inv has shape \(3, 5, 2\), which does not fit a stack of shape "
        r"\(3, 48, 64\)",
    ),
    "three axes": (
        "fp8_blocks",
        renewed("weight", lambda x: x[None]),
        r"m.weight has shape \(1, 48, 64\), expected a matrix",
    ),
    "two scales": (
        "fp8_blocks",
        lambda e: e | {"weight_scale": e["weight_scale_inv"]},
        "m.weight has two scales",
    ),
    "codes": (
        "fp8_blocks",
        renewed("weight", lambda x: x.view(np.int8)),
        "m.weight is int8, expected float8_e4m3fn or float8_e5m2",
    ),
    "no shape": (
        "compressed_int4",
        without("weight_shape"),
        "m.weight_shape is missing",
    ),
    "shape": (
        "compressed_int4",
        renewed("weight_shape", lambda x: x * 2**40),
        r"m.weight_shape is \(43980465111040, .* does not hold so many values of 4 bits",
    ),
    "zeros": (
        "compressed_int4_zeros",
        renewed("weight_zero_point", lambda x: x[:3]),
        r"m.weight_zero_point has shape \(3, 4\), expected \(5, 4\)",
    ),
    "order": (
        "compressed_int4_order",
        renewed("weight_g_idx", filled(4)),
        "m.weight_g_idx has groups from 0 to 4, and there are 4",
    ),
    "sizes": (
        "compressed_int4_order",
        renewed("weight_g_idx", lambda x: x * 0),
        "m.weight_g_idx has groups of different sizes",
    ),
    "whole": (
        "compressed_nvfp4",
        renewed("weight_global_scale", filled(0)),
        "m.weight_global_scale has values that are not above 0",
    ),
    "mxfp4": (
        "compressed_mxfp4",
        renewed("weight_scale", filled(255)),
        "m.weight_scale has NaN or Inf values",
    ),
    "stranger": (
        "compressed_float8",
        lambda e: e | {"weight_global_scale": np.ones(1, np.float32)},
        "m.weight_packed is missing",
    ),
    "no zeros": ("gptq_first", without("qzeros"), "m.qzeros is missing"),
    "no codes": ("awq_groups", without("qweight"), "m.qweight is missing"),
    "groups": (
        "gptq_order",
        renewed("g_idx", filled(-1)),
        "m.g_idx has groups from -1 to 2, and there are 3",
    ),
    "too many groups": (
        "gptq_order",
        lambda e: e | {k: np.tile(e[k], (99, 1)) for k in ("scales", "qzeros")},
        "m.scales has 297 groups of 96 columns",
    ),
    "bits": (
        "gptq_first",
        renewed("qzeros", lambda x: x[:, :6]),
        r"m.qzeros \(3, 6\), expected .* with 4 or 8 bits",
    ),
    "float zeros": (
        "awq_groups",
        renewed("qzeros", lambda x: x.view(np.float32)),
        "m.qzeros is float32, expected int32",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_entries_are_named(kind, tmp_path):
    case, change, message = DAMAGED[kind]
    shutil.copy(GOLDEN / f"{case}.safetensors", tmp_path / FILE)
    stored = dict(Checkpoint(tmp_path))
    others = {"decoded": stored.pop("decoded")}
    entries = change({k.removeprefix("m."): v for k, v in stored.items()})
    write(tmp_path / FILE, others | {f"m.{k}": v for k, v in entries.items()})
    checkpoint = opened(tmp_path, said(case))
    with pytest.raises(CheckpointError, match=message):
        checkpoint["m.weight"]


def test_what_does_not_fit_is_gathered_when_a_folder_is_opened(base, tmp_path):
    encoded, _ = folders(base, tmp_path, "gptq")
    stored = dict(Checkpoint(encoded))
    module = "model.layers.{}.mlp.up_proj".format
    del stored[module(0) + ".scales"]
    stored[module(1) + ".g_idx"] = np.zeros(3, np.int32)
    write(encoded / FILE, stored)
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        qlora.load(encoded)
    assert f"{module(0)}.scales is missing" in str(caught.value)
    assert f"{module(1)}.g_idx has shape (3,), expected (64,)" in str(caught.value)
    stored[module(1) + ".weight"] = np.zeros((128, 64), np.float32)
    write(encoded / FILE, stored)
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight is there, and .*qweight"
    ):
        qlora.load(encoded)


REFUSED = {
    "group_size is -7, expected null or a whole number": {
        "quant_method": "gptq",
        "group_size": -7,
    },
    "bits is 3; known: 4, 8": {"quant_method": "gptq", "bits": 3},
    "checkpoint_format is 'marlin'": {
        "quant_method": "gptq",
        "checkpoint_format": "marlin",
    },
    "version is 'gemv'; known: gemm": {"quant_method": "awq", "version": "GEMV"},
    "expert_dtype is 'fp4'; known: fp8": {"quant_method": "fp8", "expert_dtype": "fp4"},
    "format is 'marlin-24'": {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
    },
    "num_bits is 3": {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"weights": {"num_bits": 3}}},
    },
    "transform_config rotates": {
        "quant_method": "compressed-tensors",
        "transform_config": {"config_groups": {"R1": {}}},
    },
    "quant_method 'exl3'; known: bitsandbytes .*fp8, compressed-tensors, gptq, awq": {
        "quant_method": "exl3",
        "bits": 4.5,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_read_are_refused_by_name(message, base, tmp_path):
    hf = json.loads((base / "config.json").read_text())
    hf["quantization_config"] = REFUSED[message]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path).tensors  # noqa: B018


def test_float8_values_of_which_nothing_is_said_are_refused(base, tmp_path):
    encoded, _ = folders(base, tmp_path, "fp8")
    shutil.copy(base / "config.json", encoded / "config.json")
    with pytest.raises(CheckpointError, match="float8_e4m3fn values, and no scale"):
        qlora.load(encoded)
