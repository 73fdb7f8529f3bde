"""The places where folders of bitsandbytes, PEFT and transformers are commonly got wrong.

What else those formats ask for is in the tests of each format; training's own traps are
in tests/train/test_traps.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pallas_kernels.formats import QuantizedTensor, weight_of
from pallas_kernels.formats.absmax4 import codebook as cb
from qlora_jax.adapters import merge, split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.names import flatten
from qlora_jax.cli import inspect
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.nn import FrozenParam, Linear, QuantizedLinear, quantize
from qlora_jax.nn.packing import dequantize, quantize_tensor
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.load import load
from qlora_jax.sources.safetensors import SINGLE
from qlora_jax.sources.save import save_model
from qlora_jax.sources.source import open_source

Find = Callable[[str], Path]
BNB = "models/llama_bnb_nf4_dq_float32"
PEFT = "adapter_model.safetensors"
NF4_ERROR = 0.11
"""Relative, of a normal weight in blocks of up to 128; 0.09 to 0.10 was measured."""


def same_bits(a: np.ndarray, b: np.ndarray, name: str = "") -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert a.tobytes() == b.tobytes(), name


def rewritten(golden: Find, out: Path, edit: Callable[[dict], Any], **quant: Any):
    """Writes bitsandbytes' folder with its tensors and quantization_config edited."""
    tensors = load_file(golden(BNB) / SINGLE)
    edit(tensors)
    config = json.loads((golden(BNB) / "config.json").read_text())
    config["quantization_config"] |= quant
    return oracle.write_folder(out, config, tensors)


# bitsandbytes


@pytest.mark.parametrize("byte", [0x77, 0x00])
def test_a_zero_block_is_zero_whichever_code_its_platform_wrote(golden, byte):
    # bitsandbytes writes code 7 on a CPU and, of 0 * inf, code 0 on CUDA: value -1.
    name = "vectors/zero_blocks_16x128"
    stored = load_file(golden(f"{name}.nodq.safetensors"))
    wanted = np.load(golden(f"{name}.npz"))["dequant_nodq"]
    zero = stored["weight.absmax"] == 0
    packed = stored["weight"].copy().reshape(-1, 32)  # a block of 64 in each row
    assert 0 < zero.sum() < zero.size and (packed[zero] == 0x77).all()
    packed[zero] = byte
    stored["weight"] = packed.reshape(-1, 1)
    q = bitsandbytes.read(stored, "weight")
    np.testing.assert_array_equal(dequantize(q), wanted)  # which takes -0 for 0
    assert not np.asarray(dequantize(q)).reshape(-1, 64)[zero].any()


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((64, 320), 128), ((60, 80), 64), ((5, 33), 32)],
    # The first two bitsandbytes' own AVX-512 code decodes wrongly.
    ids=["straddling, 128", "straddling, 64", "odd, the last block partial"],
)
def test_blocks_that_end_inside_a_row_are_bitsandbytes_bytes(shape, block_size):
    w = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    q = quantize_tensor(
        jnp.asarray(w), QuantConfig(block_size=block_size, double_quant=False)
    )
    written = q.storage("w")
    # By the format's own words: flat blocks, nearest of 16, first element high.
    flat = np.append(w.reshape(-1), np.zeros(w.size % 2, np.float32))
    starts = range(0, w.size, block_size)
    absmax = np.array([np.abs(flat[i : i + block_size]).max() for i in starts])
    each = absmax[np.arange(flat.size) // block_size]
    table = cb.values("nf4")
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, flat * (1 / each))
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    same_bits(written["w"], packed.reshape(-1, 1))
    same_bits(written["w.absmax"], absmax)
    decoded = (table[codes] * each)[: w.size].reshape(shape)
    read = dequantize(bitsandbytes.read(written, "w"))
    np.testing.assert_array_equal(read, decoded)
    assert np.linalg.norm(read - w) < NF4_ERROR * np.linalg.norm(w)


def test_a_forward_pass_in_16_bits_leaves_codes_and_scales_as_they_were(
    golden, tmp_path
):
    # bitsandbytes rounds absmax to bfloat16 at the first one on some CPUs, and saves that.
    model, _ = load(golden(BNB), dtype="bfloat16")
    assert np.isfinite(tiny.logits(model, tiny.tokens())).all()
    save_model(model, tmp_path / "out", source=golden(BNB))
    before, after = (load_file(f / SINGLE) for f in (golden(BNB), tmp_path / "out"))
    assert before.keys() == after.keys()
    packed = [name for name in before if f"{name}.absmax" in before]
    assert len(packed) == 7 * model.config.num_layers
    for name, array in before.items():
        if weight_of(name) != name and "quant_state" not in name or name in packed:
            same_bits(after[name], array, name)
    for name in packed:
        state = f"{name}.quant_state.bitsandbytes__nf4"
        said, wanted = (json.loads(t[state].tobytes()) for t in (after, before))
        assert said == wanted


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_a_folder_whose_codes_are_stored_as_floats_loads_the_same(
    golden, tmp_path, storage
):
    def view(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if f"{n}.absmax" in tensors]:
            floats = tensors[name].reshape(-1).view(jnp.dtype(storage))
            tensors[name] = floats.reshape(-1, 1)

    folder = rewritten(golden, tmp_path, view, bnb_4bit_quant_storage=storage)
    stored = load_file(folder / SINGLE)
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == storage
    ours, plain = (load(f, dtype="float32")[0] for f in (folder, golden(BNB)))
    for one, other in zip(tiny.frozen(ours), tiny.frozen(plain), strict=True):
        same_bits(one, other)


def test_linears_that_a_4_bit_folder_left_dense_stay_dense(golden, tmp_path):
    # llm_int8_skip_modules, or whatever a folder of other people's has not packed.
    w = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)

    def unpack(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if "o_proj" in n]:
            del tensors[name]
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.o_proj.weight"] = w[i]

    skipped = ["lm_head", "o_proj"]
    folder = rewritten(golden, tmp_path, unpack, llm_int8_skip_modules=skipped)
    model, _ = load(folder, dtype="float32")
    attention = model.layers.attn
    assert isinstance(attention.o_proj, Linear)
    np.testing.assert_array_equal(attention.o_proj.kernel[...], w)
    assert isinstance(attention.q_proj, QuantizedLinear)
    adapted = tiny.adapted(model, zero=True)
    assert "layers.attn.o_proj" in lora_config(adapted).targets


def test_a_4_bit_folder_has_as_many_parameters_as_the_dense_one(tmp_path):
    # qlora.py counts a packed byte as one parameter.
    found = []
    for name, model in (("a", tiny.decoder()), ("b", tiny.quantized())):
        save_model(model, tmp_path / name)
        found.append(inspect.run(inspect.Args(folder=str(tmp_path / name))))
    assert found[1]["quantization"].startswith("nf4")
    assert found[0]["parameters_by_part"] == found[1]["parameters_by_part"]


# transformers and PEFT


def test_files_say_that_their_tensors_are_pytorchs(tmp_path):
    # transformers refuses a safetensors file whose metadata name no format.
    save_model(tiny.quantized(), tmp_path / "one")
    save_model(tiny.decoder(), tmp_path / "shards", shard_bytes=100_000)
    export_peft(tmp_path / "peft", tiny.adapted(tiny.decoder(), targets="q_proj"))
    files = list(tmp_path.rglob("*.safetensors"))
    assert {f.parent.name for f in files} == {"one", "shards", "peft"}
    assert len(files) > 4
    for file in files:
        with safe_open(file, "np") as opened:
            assert (opened.metadata() or {}).get("format") == "pt", file


def edited(folder: Path, edit: Callable[[dict], dict], **settings: Any) -> Path:
    """Rewrites an exported folder's tensors and settings."""
    tensors = edit(load_file(folder / PEFT))
    save_file(tensors, folder / PEFT, {"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_the_first_pattern_that_a_whole_ending_matches_decides(tmp_path):
    folder = export_peft(tmp_path / "a", tiny.adapted(tiny.decoder(), alpha=8.0))
    patterns = {
        "proj": 1,  # only a part of a name
        "model.layers.0": 2,  # no ending
        "q_proj|k_proj": 3,
        r"self_attn\..*": 5,
        "q_proj": 6,  # the first has it
        r"layers\.\d+\.mlp\.up_proj": 7,
    }
    edited(folder, lambda t: t, alpha_pattern=patterns)
    config = lora_config(import_peft(folder, tiny.decoder()))
    names = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
    alphas = [config.shape_of(f"layers.{name}_proj")[1] for name in names]
    assert alphas == [3, 3, 5, 5, 7, 8, 8]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_stored_in_16_bits_trains_in_float32(tmp_path, dtype):
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    folder = export_peft(tmp_path / "a", model)
    short = {n: x.astype(jnp.dtype(dtype)) for n, x in load_file(folder / PEFT).items()}
    edited(folder, lambda _: short)
    lora = flatten(split(import_peft(folder, tiny.decoder("bfloat16")))[1])
    assert {x.dtype for x in lora.values()} == {np.dtype("float32")}
    wanted = short["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    found = np.asarray(lora["layers.1.attn.q_proj.lora_a"])
    np.testing.assert_array_equal(found, wanted.astype(np.float32).T)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model.base_model.model."),
        (".lora_A.", ".lora_a."),
        (".self_attn.", ".attn."),
    ],
)
def test_tensors_that_peft_would_pass_over_are_refused(tmp_path, old, new):
    # PEFT warns, and the model is the base alone.
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    folder = export_peft(tmp_path / "a", model)
    edited(folder, lambda t: {name.replace(old, new, 1): x for name, x in t.items()})
    with pytest.raises(AdapterMismatchError, match="no tensor of an|has no module"):
        import_peft(folder, tiny.decoder())
    with pytest.raises(AdapterMismatchError):
        load_adapter(folder, tiny.decoder())


def test_loading_a_second_adapter_replaces_the_first_or_is_refused(tmp_path):
    # PEFT returns without a word where the name is taken.
    first, second = (tiny.adapted(tiny.decoder(), seed=seed) for seed in (5, 6))
    save_adapter(tmp_path / "a", split(second)[1], lora_config(second))
    wanted, found, before = (
        flatten(split(m)[1])
        for m in (second, load_adapter(tmp_path / "a", first), first)
    )
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert not np.array_equal(before[name], array)
    folder = export_peft(tmp_path / "peft", second)
    with pytest.raises(AdapterMismatchError, match="has an adapter at .* already"):
        import_peft(folder, first)


def test_attaching_casts_and_copies_nothing_of_the_base():
    # prepare_model_for_kbit_training makes embedding, head and norms float32.
    def leaves(model: nnx.Module) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(model, FrozenParam))

    model = tiny.quantized("bfloat16", bias=True)
    before, after = leaves(model), leaves(tiny.adapted(model))
    assert len(before) == len(after)
    kept = {x.unsafe_buffer_pointer() for x in before}
    assert {x.unsafe_buffer_pointer() for x in after} == kept
    assert {x.dtype.name for x in after} == {"bfloat16", "float32", "uint16", "uint8"}
    dense = (model.embed_tokens, model.norm, model.layers.attn_norm)
    assert {x.weight[...].dtype.name for x in dense} == {"bfloat16"}


def test_merging_onto_original_or_dequantized_weights_is_what_it_says():
    # Both users' choices: they differ by what 4 bits lost, also where no adapter is.
    original, packed = tiny.decoder(), tiny.quantized()
    merged = [
        merge(tiny.adapted(base, targets="q_proj"), dtype="float32")
        for base in (original, packed)
    ]
    for name in ("q_proj", "k_proj"):
        dense = np.asarray(getattr(original.layers.attn, name).kernel[...])
        q = getattr(packed.layers.attn, name).quantized
        assert isinstance(q, QuantizedTensor)
        lost = dense - np.asarray(dequantize(q, "float32"))
        on_original, on_packed = (
            np.asarray(getattr(m.layers.attn, name).kernel[...]) for m in merged
        )
        np.testing.assert_allclose(on_original - on_packed, lost, atol=1e-6, rtol=0)
        assert np.abs(lost).max() > 0.01
        assert (on_original != dense).any() == (name == "q_proj")


# What was let through once


def test_an_adapter_that_a_model_has_is_replaced_with_its_scale(tmp_path: Path):
    saved = tiny.adapted(tiny.decoder(), rank=4, alpha=32.0, targets="q_proj")
    save_adapter(tmp_path / "a", split(saved)[1], lora_config(saved))
    x = tiny.tokens()
    wanted = tiny.logits(saved, x)
    for other in ({"alpha": 8.0, "targets": "q_proj"}, {"rank": 2, "tokens": (3,)}):
        model = load_adapter(tmp_path / "a", tiny.adapted(tiny.decoder(), **other))
        assert lora_config(model) == lora_config(saved)
        np.testing.assert_array_equal(tiny.logits(model, x), wanted)
    with pytest.raises(AdapterMismatchError, match="its base had other weights"):
        load_adapter(tmp_path / "a", tiny.adapted(tiny.decoder(seed=1)))
    trained = tiny.adapted(tiny.decoder(), modules_to_save="norm")
    with pytest.raises(AdapterMismatchError, match="norm.weight trained in place"):
        load_adapter(tmp_path / "a", trained)


@pytest.mark.parametrize(
    ("settings", "drop", "message"),
    [
        ({}, "v_proj", "names model.layers.0.self_attn.v_proj, .*has nothing"),
        ({}, "layers.1", r"names model.layers.1.self_attn.q_proj, .*v_proj, of which"),
        ({"modules_to_save": ["lm_head"]}, "nothing", "names lm_head, of which"),
        ({"init_lora_weights": "pissa_niter_4"}, "nothing", "changed the base's weigh"),
        ({"init_lora_weights": "olora"}, "nothing", "changed the base's weights"),
        ({"use_velora": True}, "nothing", "use_velora is True, a setting that is not"),
    ],
)
def test_a_peft_folder_that_says_more_than_it_holds_is_refused(
    tmp_path: Path, settings, drop, message
):
    model = tiny.adapted(tiny.decoder(), targets="q_proj,v_proj")
    folder = export_peft(tmp_path / "a", model)
    tensors = load_file(folder / PEFT)
    save_file({k: v for k, v in tensors.items() if drop not in k}, folder / PEFT)
    said = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(AdapterMismatchError, match=message):
        import_peft(folder, tiny.decoder())


def test_a_peft_adapter_of_some_layers_says_so(tmp_path: Path):
    model = tiny.adapted(tiny.decoder(), targets="q_proj", layers=(1,))
    folder = export_peft(tmp_path / "a", model)
    said = json.loads((folder / "adapter_config.json").read_text())
    said |= {"target_modules": ["q_proj"], "layers_to_transform": 1}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert lora_config(import_peft(folder, tiny.decoder())).layers == (1,)


def test_a_peft_adapter_that_is_not_finite_is_refused(tmp_path: Path):
    folder = export_peft(tmp_path / "a", tiny.adapted(tiny.decoder()))
    tensors = load_file(folder / PEFT)
    name = next(iter(tensors))
    tensors[name][0, 0] = np.nan
    save_file(tensors, folder / PEFT)
    with pytest.raises(AdapterMismatchError, match="has NaN or Inf values"):
        import_peft(folder, tiny.decoder())


def test_a_peft_folder_without_rank_has_pefts_default(tmp_path: Path):
    model = tiny.adapted(tiny.decoder(), rank=8, alpha=8.0)
    folder = export_peft(tmp_path / "a", model)
    said = json.loads((folder / "adapter_config.json").read_text())
    said = {k: v for k, v in said.items() if k != "r"} | {"lora_alpha": None}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert lora_config(import_peft(folder, tiny.decoder())).rank == 8


def test_a_4_bit_folder_says_its_block_size_and_what_stays_dense(tmp_path: Path):
    quant = QuantConfig(block_size=128)
    save_model(quantize(tiny.decoder(), quant), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert open_source(tmp_path / "a").stored == quant
    load(tmp_path / "a", quant)
    skip = ["lm_head", "o_proj", "vision_tower"]  # o_proj is 4-bit here all the same
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    save_model(load(tmp_path / "a")[0], tmp_path / "b", source=tmp_path / "a")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    kept = again["quantization_config"]["llm_int8_skip_modules"]
    assert kept == ["lm_head", "vision_tower"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": "q_proj,v_prj"}, "'v_prj' matches no linear; near: v_proj"),
        ({"rank_pattern": {"down_prj": 8}}, "rank-pattern down_prj is no linear with"),
        (
            {"targets": "q_proj", "alpha_pattern": {"v_proj": 8.0}},
            "alpha-pattern v_proj is no linear with an adapter; there are q_proj",
        ),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(config, message):
    with pytest.raises(ConfigError, match=message):
        tiny.adapted(tiny.decoder(), **config)
