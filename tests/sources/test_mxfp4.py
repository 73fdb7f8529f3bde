"""Folders of gpt-oss: experts of a layer in one tensor, dense or in MXFP4."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from format_cases import E2M1
from models import family_cases as cases
from models import family_folders
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from pallas_kernels.formats import PackedWeight
from qlora_jax.budget.estimate import abstract_parts, tree_bytes
from qlora_jax.budget.setup import Setup
from qlora_jax.cli.main import main
from qlora_jax.errors import CheckpointError
from qlora_jax.models import Decoder
from qlora_jax.nn import FrozenLinear, Linear
from qlora_jax.nn.frozen import modules
from qlora_jax.sources.load import outline

CASE = "gpt_oss"
FILE, EXPERTS = "model.safetensors", "model.layers.1.mlp.experts"
TOKENS = jnp.asarray(cases.tokens(CASE, 9))


@pytest.fixture(scope="module")
def dense(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    made = family_folders.read(CASE, golden)
    made["saved"]["config"]["intermediate_size"] = 32
    for name, shape in made["saved"]["tensors"].items():
        sizes = {24: 32, 48: 64}
        changed = [sizes.get(n, n) if "experts" in name else n for n in shape]
        made["saved"]["tensors"][name] = changed
    family_folders.load(CASE, made, folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory) -> Path:
    return family_folders.in_mxfp4(dense, tmp_path_factory.mktemp("packed") / "base")


def held(model: Decoder) -> dict[str, str]:
    """Returns how linears are held, by their last names."""
    return {
        str(path[-1]): node.stored.CALLED if node.packed else "dense"
        for path, node in modules(model, FrozenLinear)
    }


def changed(folder: Path, out: Path, **tensors: np.ndarray | None) -> Path:
    """Copies a folder with other tensors of a layer's experts; None leaves one out."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    stored = load_file(folder / FILE)
    stored |= {f"{EXPERTS}.{name}": array for name, array in tensors.items()}
    save_file({k: v for k, v in stored.items() if v is not None}, out / FILE)
    return out


def test_experts_are_kept_in_mxfp4_and_mean_what_the_format_says(packed):
    model, _ = qlora.load(packed, dtype="float32")
    kinds = held(model)
    assert kinds.pop("gate_proj") == kinds.pop("up_proj") == "MXFP4"
    assert kinds.pop("down_proj") == "MXFP4" and {*kinds.values()} == {"dense"}
    stored = load_file(packed / FILE)
    blocks, scales = (
        stored[f"{EXPERTS}.gate_up_proj_{x}"] for x in ("blocks", "scales")
    )
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    values = E2M1[codes] * 2.0 ** (scales[..., None].astype(np.float64) - 127)
    values = values.reshape(*values.shape[:2], -1)
    experts = model.stacks[1].mlp.experts  # of layer 1 alone: the pattern has two slots
    for name, rows in (("gate_proj", values[:, ::2]), ("up_proj", values[:, 1::2])):
        got = getattr(experts, name).weight("float32")
        np.testing.assert_array_equal(got[0], rows)


def test_they_are_decoded_where_that_is_asked_for(packed):
    kept = qlora.load(packed, qlora.QuantConfig(), "float32")[0]
    assert {*held(kept).values()} == {"MXFP4", "4-bit", "dense"}  # the head is dense
    plain = qlora.load(packed, dtype="float32")[0]
    decoded = qlora.load(packed, dtype="float32", mxfp4="decode")[0]
    assert {*held(decoded).values()} == {"dense"}
    np.testing.assert_array_equal(
        tiny.logits(decoded, TOKENS), tiny.logits(plain, TOKENS)
    )
    four = qlora.load(packed, qlora.QuantConfig(), "float32", mxfp4="decode")[0]
    assert {*held(four).values()} == {"4-bit", "dense"}
    names = ("gate_proj", "up_proj", "down_proj")
    for a, b in zip(decoded.stacks, four.stacks, strict=True):
        for one, other in (
            (getattr(x.mlp.experts, name) for x in (a, b)) for name in names
        ):
            again = other.stored[0, 0].requantize(one.weight()[0, 0])
            np.testing.assert_array_equal(again.decode(), other.stored[0, 0].decode())


@pytest.mark.parametrize("quant", [None, qlora.QuantConfig()])
def test_what_is_saved_opens_again_as_it_was(packed, tmp_path, quant):
    model, _ = qlora.load(packed, quant, "float32")
    qlora.save_model(model, tmp_path / "again", source=packed)
    method = json.loads((tmp_path / "again/config.json").read_text())
    method = method["quantization_config"]["quant_method"]
    assert method == ("mxfp4" if quant is None else "qlora_jax_two_formats")
    stored, again = load_file(packed / FILE), load_file(tmp_path / "again" / FILE)
    for name in stored:
        if "experts" in name or quant is None:
            np.testing.assert_array_equal(again[name], stored[name])
    back, _ = qlora.load(tmp_path / "again", dtype="float32")
    assert back.config == model.config
    for a, b in zip(tiny.frozen(back), tiny.frozen(model), strict=True):
        np.testing.assert_array_equal(a, b)
    copied = tmp_path / "copied"  # by the command, tensor by tensor
    args = ["quantize", "--model", packed, "--out", copied, "--dtype", "float32"]
    if quant is not None:
        assert main([*map(str, args)]) == 0
        for name, array in load_file(copied / FILE).items():
            np.testing.assert_array_equal(array, again[name])


def test_the_plan_and_the_outline_know_what_is_kept(packed):
    setup = {"dtype": "float32", "quant": qlora.QuantConfig()}
    for mxfp4 in ("keep", "decode"):
        model, _ = qlora.load(packed, setup["quant"], "float32", mxfp4=mxfp4)
        base = qlora.split(tiny.moved(model))[2]
        made = Setup(config=model.config, mxfp4=mxfp4, **setup)
        assert tree_bytes(abstract_parts(made)[2]) == tree_bytes(base)
        shapes = outline(packed, setup["quant"], mxfp4=mxfp4).model
        assert held(shapes) == held(model)


def test_an_adapter_trains_on_them_and_is_merged_into_what_they_decode_to(
    packed, tmp_path
):
    model, _ = qlora.load(packed, dtype="float32")
    adapted = tiny.moved(model, rank=2)
    merged = qlora.merge(adapted, dtype="float32")
    assert not any(node.packed for _, node in modules(merged, Linear))
    np.testing.assert_allclose(
        tiny.logits(merged, TOKENS), tiny.logits(adapted, TOKENS), atol=2e-4
    )
    qlora.save_model(merged, tmp_path / "merged", source=packed)
    names = {*load_file(tmp_path / "merged" / FILE)}
    assert f"{EXPERTS}.gate_up_proj" in names and not any(".0.gate" in x for x in names)
    back, _ = qlora.load(tmp_path / "merged", dtype="float32")
    np.testing.assert_array_equal(
        tiny.logits(back, TOKENS), tiny.logits(merged, TOKENS)
    )
    kernels = [node.stored for _, node in modules(adapted, FrozenLinear)]
    assert any(isinstance(kernel, PackedWeight) for kernel in kernels)


def test_what_does_not_fit_is_named(packed, dense, tmp_path):
    stored = load_file(packed / FILE)
    scales = stored[f"{EXPERTS}.down_proj_scales"].copy()
    scales[2, 3, 0] = 255
    bias = load_file(dense / FILE)[f"{EXPERTS}.down_proj_bias"]
    for at, (base, tensors, message) in enumerate(
        [
            (
                packed,
                {"down_proj_scales": scales},
                r"experts.2.down_proj.weight_scales has",
            ),
            (
                packed,
                {"down_proj_scales": None},
                r"0.down_proj.weight_scales is missing",
            ),
            (
                packed,
                {"gate_up_proj_bias": None},
                r"experts.0.gate_proj.bias is missing",
            ),
            (
                dense,
                {"down_proj_bias": bias[:3]},
                r"not hold the 1 matrices of 4 experts",
            ),
            (dense, {"0.down_proj.bias": bias[0]}, r"a part of .*down_proj_bias too"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            qlora.load(changed(base, tmp_path / str(at), **tensors))


def test_inspect_says_how_they_are_stored(packed, capsys):
    assert main(["inspect", str(packed)]) == 0
    said = capsys.readouterr().out
    figures = json.loads(said.splitlines()[-1])
    assert figures["tensors_by_kind"]["MXFP4"] == 36
    assert figures["quantization"] == "experts in MXFP4, else dense"
    assert "feed-forward" not in figures["parameters_by_part"]  # but a router's bias
