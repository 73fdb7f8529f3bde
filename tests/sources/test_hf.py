"""Hugging Face folders: loading, quantizing on the way, saving, and what is refused."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

from pallas_kernels.formats import QuantizedTensor
from qlora_jax.adapters import Adapter
from qlora_jax.config.quant import QuantConfig
from qlora_jax.digests import NAME as DIGESTS
from qlora_jax.errors import CheckpointError, OutputExistsError, ShapeError
from qlora_jax.exchange.peft import export_peft
from qlora_jax.models import Decoder
from qlora_jax.nn import FrozenParam, Linear, QuantizedLinear, quantize
from qlora_jax.nn.packing import dequantize
from qlora_jax.sources import hub
from qlora_jax.sources.load import load
from qlora_jax.sources.quantize import quantize_folder
from qlora_jax.sources.safetensors import INDEX, SINGLE
from qlora_jax.sources.save import _skipped, save_model
from qlora_jax.sources.source import open_source

CONFIG = oracle.hf_config()
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def tensors() -> dict[str, np.ndarray]:
    return oracle.hf_tensors(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small dense Llama in float32."""
    return oracle.write_folder(tmp_path_factory.mktemp("llama"), CONFIG, tensors())


@pytest.fixture(scope="module")
def model(folder) -> Decoder:
    return load(folder, dtype="float32")[0]


def same(a: Decoder, b: Decoder) -> None:
    """Asserts that two models have the same structure and the same bits."""
    first, second = (dict(nnx.to_flat_state(nnx.state(m))) for m in (a, b))
    assert first.keys() == second.keys()
    for path, variable in first.items():
        x, y = variable.get_value(), second[path].get_value()
        assert jax.tree.structure(x) == jax.tree.structure(y), path
        for left, right in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            assert left.dtype == right.dtype, path
            np.testing.assert_array_equal(left, right, err_msg=str(path))


def changed(tmp_path: Path, **values: np.ndarray | None) -> Path:
    """Writes the folder with some tensors replaced, or left out."""
    made = tensors() | values
    made = {name: value for name, value in made.items() if value is not None}
    return oracle.write_folder(tmp_path / "changed", CONFIG, made)


def test_a_dense_folder_loads_as_frozen_params_with_the_layers_stacked(model):
    state = nnx.to_flat_state(nnx.state(model))
    assert all(isinstance(variable, FrozenParam) for _, variable in state)
    kernel = model.layers.attn.q_proj.kernel[...]
    assert kernel.shape == (2, 64, 64)
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        np.testing.assert_array_equal(kernel[i], tensors()[name])
    np.testing.assert_array_equal(
        model.embed_tokens.weight[...], tensors()["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(
        model.lm_head.kernel[...], tensors()["lm_head.weight"]
    )


def test_shards_load_as_a_single_file(model, tmp_path):
    save_model(model, tmp_path / "shards", shard_bytes=50_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    same(load(tmp_path / "shards", dtype="float32")[0], model)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")],
)
def test_sources_of_any_precision_load_at_any_other(tmp_path, source, dtype):
    values = {name: x.astype(jnp.dtype(source)) for name, x in tensors().items()}
    loaded, _ = load(oracle.write_folder(tmp_path, CONFIG, values), dtype=dtype)
    assert loaded.compute_dtype == dtype
    for _, variable in nnx.to_flat_state(nnx.state(loaded)):
        assert variable.get_value().dtype == dtype
    np.testing.assert_array_equal(
        loaded.layers.attn.q_proj.kernel[...][1],
        values[Q_PROJ].astype(jnp.dtype(dtype)),
    )


@pytest.mark.parametrize(
    "config",
    [QuantConfig(), QuantConfig(codebook="fp4", block_size=32, double_quant=False)],
)
def test_quantizing_on_load_equals_quantizing_what_was_loaded(folder, model, config):
    loaded, _ = load(folder, config, dtype="float32")
    same(loaded, quantize(model, config))
    for linear in (loaded.layers.attn.q_proj, loaded.layers.mlp.down_proj):
        assert isinstance(linear, QuantizedLinear)
        assert linear.quantized.block_size == config.block_size
    assert isinstance(loaded.lm_head, Linear)
    assert isinstance(loaded.embed_tokens.weight[...], jax.Array)


def test_codes_are_made_of_the_source_and_not_of_the_compute_dtype(folder):
    wide, _ = load(folder, QuantConfig(), dtype="float32")
    short, _ = load(folder, QuantConfig(), dtype="bfloat16")
    for linear in ("q_proj", "o_proj"):
        np.testing.assert_array_equal(
            getattr(wide.layers.attn, linear).quantized.codes,
            getattr(short.layers.attn, linear).quantized.codes,
        )
    assert short.lm_head.kernel[...].dtype == jnp.bfloat16


def test_a_bitsandbytes_folder_is_read_as_it_is(golden):
    folder = golden("models/llama_bnb_nf4_dq_float32")
    loaded, _ = load(folder, dtype="float32")
    same(loaded, load(folder, QuantConfig(), dtype="float32")[0])
    assert isinstance(loaded.layers.attn.q_proj.quantized, QuantizedTensor)
    with pytest.raises(CheckpointError, match="quantized already .*cannot become"):
        load(folder, QuantConfig(codebook="fp4"))


def test_a_bitsandbytes_folder_is_saved_as_transformers_saved_it(golden, tmp_path):
    folder = golden("models/llama_bnb_nf4_dq_float32")
    loaded, _ = load(folder, dtype="float32")
    result = save_model(loaded, tmp_path / "again", source=folder)
    stored, again = (load_file(path / SINGLE) for path in (folder, tmp_path / "again"))
    assert again.keys() == stored.keys()
    for name, value in stored.items():
        if "quant_state" in name:
            assert json.loads(again[name].tobytes()) == json.loads(value.tobytes())
            continue
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    configs = [
        json.loads((path / "config.json").read_text())
        for path in (folder, tmp_path / "again")
    ]
    for key in ("quantization_config", "model_type", "hidden_size", "rope_parameters"):
        assert configs[1][key] == configs[0][key]
    assert result["out"] == str(tmp_path / "again")
    assert result["bytes"] == sum(value.nbytes for value in again.values())


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        (None, "float32"),
        (None, "bfloat16"),
        (QuantConfig(), "bfloat16"),
        (QuantConfig(codebook="int4", block_size=128, double_quant=False), "float32"),
    ],
)
def test_what_is_saved_loads_as_it_was(folder, tmp_path, quant, dtype):
    loaded, _ = load(folder, quant, dtype=dtype)
    save_model(loaded, tmp_path / "out")
    same(load(tmp_path / "out", dtype=dtype)[0], loaded)
    config = json.loads((tmp_path / "out/config.json").read_text())
    stored = load_file(tmp_path / "out" / SINGLE)
    assert stored["lm_head.weight"].dtype == jnp.dtype(dtype)
    assert config["torch_dtype"] == dtype
    assert ("quantization_config" in config) == (quant is not None)


def test_the_source_gives_its_config_and_tokenizer(model, tmp_path):
    source = oracle.write_folder(tmp_path / "source", CONFIG | {"mine": 1}, tensors())
    tiny.byte_tokenizer().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (source / "notes.txt").write_text("stays behind")
    save_model(model, tmp_path / "out", source=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == {SINGLE, "config.json", DIGESTS, *tokenizer}
    assert json.loads((tmp_path / "out/config.json").read_text())["mine"] == 1
    loaded, tokenizer = load(tmp_path / "out", dtype="float32")
    assert tokenizer.eos_ids == (tiny.EOS,)
    same(loaded, model)


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "qwen2"}, {"model_type": "mistral", "sliding_window": 3}],
    ids=["qwen2", "mistral"],
)
def test_every_family_survives_saving_without_a_source(tmp_path, changes):
    hf = oracle.hf_config(**changes)
    source = oracle.write_folder(tmp_path / "source", hf, oracle.hf_tensors(hf))
    loaded, _ = load(source, dtype="float32")
    save_model(loaded, tmp_path / "out")
    again, _ = load(tmp_path / "out", dtype="float32")
    assert again.config == loaded.config
    same(again, loaded)


def test_a_tokenizer_that_links_elsewhere_is_not_copied(model, tmp_path):
    source = oracle.write_folder(tmp_path / "source", CONFIG, tensors())
    (tmp_path / "secret").write_text("far")
    (source / "tokenizer.model").symlink_to(tmp_path / "secret")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "x.jinja").symlink_to("../../secret")
    (source / "inside").write_text("near")
    (source / "merges.txt").symlink_to("inside")
    export = functools.partial(export_peft, tmp_path / "out", tokenizer=source)
    for write in (
        lambda: save_model(model, tmp_path / "out", source=source),
        lambda: quantize_folder(open_source(source), tmp_path / "out", QuantConfig()),
        lambda: export(tiny.adapted(tiny.decoder())),
    ):
        with pytest.raises(CheckpointError, match=r"not copied from.*2 problems") as e:
            write()
        assert f"tokenizer.model is a link to {tmp_path / 'secret'}" in str(e.value)
        assert "x.jinja" in str(e.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_in_a_hub_cache_is_copied(model, tmp_path):
    repo = tmp_path / "models--a--b"
    source = oracle.write_folder(repo / "snapshots" / "1234", CONFIG, tensors())
    (repo / "blobs").mkdir()
    (repo / "blobs" / "ab").write_text("near")
    (source / "merges.txt").symlink_to("../../blobs/ab")
    save_model(model, tmp_path / "out", source=source)
    assert (tmp_path / "out" / "merges.txt").read_text() == "near"
    assert not (tmp_path / "out" / "merges.txt").is_symlink()


def test_another_models_tokenizer_is_never_taken_for_the_new_ones(model, tmp_path):
    out = tmp_path / "out"
    save_model(model, out)
    (out / "chat_template.jinja").write_text("mine")
    before = (out / SINGLE).read_bytes()
    with pytest.raises(OutputExistsError, match=r"has chat_template\.jinja of another"):
        save_model(tiny.decoder(seed=1), out, overwrite=True)
    assert (out / SINGLE).read_bytes() == before
    source = oracle.write_folder(tmp_path / "source", CONFIG, tensors())
    (source / "chat_template.jinja").write_text("theirs")
    save_model(model, out, source=source, overwrite=True)
    assert (out / "chat_template.jinja").read_text() == "theirs"
    save_model(model, out, overwrite=True)  # which was ours, and goes
    assert not (out / "chat_template.jinja").exists()


def test_an_output_that_is_not_empty_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty.*--overwrite"):
        save_model(model, tmp_path)
    with pytest.raises(OutputExistsError, match="notes.txt is a file"):
        save_model(model, tmp_path / "notes.txt", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")


def test_overwriting_keeps_what_it_does_not_write(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_model(model, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    same(load(tmp_path, dtype="float32")[0], model)


def test_overwriting_shards_with_a_single_file_leaves_no_stale_index(
    model, folder, tmp_path
):
    other, _ = load(folder, QuantConfig(), dtype="float32")
    save_model(other, tmp_path, shard_bytes=50_000)
    assert (tmp_path / INDEX).exists()
    save_model(model, tmp_path, overwrite=True)
    same(load(tmp_path, dtype="float32")[0], model)


@pytest.mark.parametrize("shards", [50_000, 100_000])
def test_overwriting_replaces_the_model_that_was_there(model, folder, tmp_path, shards):
    other, _ = load(folder, QuantConfig(), dtype="float32")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    for size in (1 << 30, 200_000, shards, 1 << 30, 50_000):  # files and shards in turn
        save_model(other, tmp_path, overwrite=True, shard_bytes=size)
        save_model(model, tmp_path, overwrite=True, shard_bytes=shards)
        stored = {path.name for path in tmp_path.glob("*.safetensors")}
        index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        assert stored == {*index.values(), "mine.safetensors"}
    same(load(tmp_path, dtype="float32")[0], model)
    save_model(other, tmp_path, overwrite=True)
    same(load(tmp_path, dtype="float32")[0], other)
    assert not (tmp_path / INDEX).exists()
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("shards", [1 << 30, 50_000])
def test_values_beyond_float16_are_never_saved(folder, tmp_path, shards):
    loaded, _ = load(folder, dtype="float32")
    loaded.norm.weight.set_value(loaded.norm.weight[...].at[3].set(1e6))
    kernel = loaded.layers.attn.q_proj.kernel
    kernel.set_value(kernel[...].at[1, 2, 3].set(-7e4))
    graphdef, state = nnx.split(loaded)
    narrow = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype("float16"), state))
    save_model(tiny.decoder(), tmp_path / "there")
    before = load_file(tmp_path / "there" / SINGLE)
    for out in ("new", "there"):
        with pytest.raises(CheckpointError, match="2 problems") as caught:
            save_model(narrow, tmp_path / out, overwrite=True, shard_bytes=shards)
    for name in ("model.norm.weight", Q_PROJ):
        assert f"{name}: values beyond 65504, the largest of float16" in str(
            caught.value
        )
    assert not (tmp_path / "new").exists()
    assert {p.name for p in (tmp_path / "there").iterdir()} == {
        *(SINGLE, "config.json", DIGESTS)
    }
    for name, value in load_file(tmp_path / "there" / SINGLE).items():
        np.testing.assert_array_equal(value, before[name])


def test_quantized_values_beyond_float16_are_never_saved(folder, tmp_path):
    loaded, _ = load(folder, QuantConfig(double_quant=False), dtype="float16")
    kernel = loaded.layers.attn.o_proj.kernel
    q = kernel.get_value()
    large = dataclasses.replace(
        q, dtype="float16", absmax=q.absmax.at[(0,) * q.absmax.ndim].set(1e5)
    )
    kernel.set_value(large)
    with pytest.raises(CheckpointError, match=r"o_proj.*up to 1e\+05, beyond 65504"):
        save_model(loaded, tmp_path / "out")


def test_a_folder_may_be_saved_onto_itself_when_asked_for(tmp_path):
    source = oracle.write_folder(tmp_path, CONFIG, tensors())
    tiny.byte_tokenizer().save(str(source / "tokenizer.json"))
    loaded, _ = load(source, QuantConfig(), dtype="float32")
    save_model(loaded, source, source=source, overwrite=True)
    again, tokenizer = load(source, dtype="float32")
    assert tokenizer is not None
    same(again, loaded)


def test_a_model_with_adapters_is_not_saved(model, tmp_path):
    with pytest.raises(CheckpointError, match="adapters attached; merge before"):
        save_model(tiny.adapted(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", ["nothing", "a file", "an empty folder"])
def test_a_path_that_is_no_model_is_refused(tmp_path, make):
    path = tmp_path / "base"
    if make == "a file":
        path.write_text("x")
    if make == "an empty folder":
        path.mkdir()
    with pytest.raises(
        CheckpointError, match=r"base (is no folder and no hub id|has no)"
    ):
        load(path)


def test_an_unknown_architecture_names_those_known(tmp_path):
    oracle.write_folder(tmp_path, CONFIG | {"model_type": "rwkv"}, tensors())
    with pytest.raises(
        CheckpointError,
        match="model_type is 'rwkv'; known .*llama, .*mistral.*nearest is llama",
    ):
        load(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    oracle.write_folder(tmp_path, CONFIG, tensors())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load(tmp_path)


def test_a_config_with_values_of_a_wrong_kind_is_refused(tmp_path):
    hf = CONFIG | {"model_type": "gemma2", "query_pre_attn_scalar": None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(
        CheckpointError,
        match="scalar is null, expected a number above 0",
    ):
        load(tmp_path)


def test_all_problems_of_a_config_are_gathered(tmp_path):
    hf = CONFIG | {"hidden_act": "relu", "quantization_config": {"quant_method": "hqq"}}
    oracle.write_folder(tmp_path, hf, tensors())
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*'relu'.*'hqq'"):
        load(tmp_path)


def test_missing_and_misshapen_tensors_are_all_named(tmp_path):
    path = changed(
        tmp_path,
        **{
            "model.norm.weight": None,
            "model.layers.0.mlp.up_proj.weight": None,
            Q_PROJ: np.zeros((64, 32), np.float32),
        },
    )
    with pytest.raises(CheckpointError, match=r"3 problems") as caught:
        load(path)
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight is missing",
        f"{Q_PROJ} has shape (64, 32), config.json wants (64, 64)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("quant", [None, QuantConfig()])
def test_values_that_are_not_finite_are_all_named(tmp_path, quant):
    values = tensors()
    values[Q_PROJ][40, 5] = np.nan
    values["model.layers.0.mlp.down_proj.weight"][3, 100] = np.inf
    values["model.norm.weight"][7] = -np.inf
    values["model.embed_tokens.weight"][40, 60] = np.nan
    with pytest.raises(CheckpointError, match="4 problems") as caught:
        load(changed(tmp_path, **values), quant)
    message = str(caught.value)
    for name in (Q_PROJ, "model.norm", "embed_tokens", "model.layers.0.mlp.down_proj"):
        assert name in message
    assert "NaN or Inf" in message


def test_a_weight_too_large_for_its_dtype_is_named(tmp_path):
    values = tensors()
    values["model.norm.weight"][0] = 1e6
    path = changed(tmp_path, **values)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .*too large"):
        load(path, dtype="float16")
    load(path, dtype="bfloat16")


def test_a_truncated_file_names_its_tensors(tmp_path):
    path = changed(tmp_path) / SINGLE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: .* ends at .*truncated"):
        load(path.parent)


def test_damaged_4_bit_weights_are_all_named(golden, tmp_path):
    source = golden("models/llama_bnb_nf4_dq_float32")
    stored = dict(load_file(source / SINGLE))
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    del stored[f"{first}.nested_absmax"]
    stored[f"{second}.nested_absmax"] = stored[f"{second}.nested_absmax"] * np.nan
    oracle.write_folder(
        tmp_path, json.loads((source / "config.json").read_text()), stored
    )
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load(tmp_path)
    assert f"{first}.nested_absmax is missing" in str(caught.value)
    assert f"{second}: NaN or Inf in its absmax" in str(caught.value)


def test_a_folder_may_keep_linears_of_some_layers_dense(tmp_path, golden):
    """Unsloth's dynamic 4-bit folders do so."""
    source = golden("models/llama_bnb_nf4_dq_float32")
    whole, _ = load(source, dtype="float32")
    stored = dict(load_file(source / SINGLE))
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = {k: v for k, v in stored.items() if not k.startswith(name)}
    layer = jax.tree.map(lambda x: x[1], whole.layers.attn.q_proj.quantized)
    stored[name] = np.asarray(dequantize(layer, "float32"))
    hf = json.loads((source / "config.json").read_text())
    oracle.write_folder(tmp_path / "mixed", hf, stored)
    mixed, _ = load(tmp_path / "mixed", dtype="float32")
    kinds = [type(stack.attn.q_proj) for stack in mixed.stacks]
    assert kinds == [QuantizedLinear, Linear]
    assert type(mixed.stacks[1].attn.k_proj) is QuantizedLinear
    ids = jnp.arange(12).reshape(2, 6)
    expected = np.asarray(whole(ids))
    np.testing.assert_allclose(mixed(ids), expected, atol=1e-5 * np.abs(expected).max())
    # What is saved says which linear is dense, for other tools, and is the same again.
    save_model(mixed, tmp_path / "again", source=tmp_path / "mixed")
    again = json.loads((tmp_path / "again/config.json").read_text())
    skipped = again["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.self_attn.q_proj" in skipped
    back = dict(load_file(tmp_path / "again" / SINGLE))
    assert back.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    # One adapter for both kinds of layers, whose base counts as the same.
    model = tiny.moved(mixed)
    on = np.asarray(Adapter.of(model).on(whole)(ids))
    np.testing.assert_allclose(model(ids), on, atol=1e-5 * np.abs(on).max())
    assert np.abs(on - expected).max() > 0.01


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),  # transformers' own defaults
        (["lm_head", "vision"], ["lm_head", "vision"]),
        (["lm_head", "a.0.down"], ["lm_head", "a.2.down"]),  # 4-bit now, and dense now
        (["a.0", "gate"], ["gate", "a.0.norm", "a.2.down"]),  # stood for a whole layer
    ],
)
def test_other_tools_are_told_what_is_dense(before, after):
    packed = [f"a.{i}.{x}.weight" for i in (0, 1) for x in ("down", "up")]
    dense = ["a.0.norm.weight", "a.1.norm.weight", "lm_head.weight"]
    if before != after:
        dense.append("a.2.down.weight")
    assert _skipped(before, packed, dense) == after


def test_layers_of_different_block_sizes_are_named(tmp_path, folder):
    both = [
        load(folder, QuantConfig(block_size=size), dtype="float32")[0]
        for size in (64, 32)
    ]
    for model, name in zip(both, "ab", strict=True):
        save_model(model, tmp_path / name)
    first, second = (dict(load_file(tmp_path / x / SINGLE)) for x in "ab")
    first |= {k: v for k, v in second.items() if k.startswith(Q_PROJ)}
    config = json.loads((tmp_path / "a/config.json").read_text())
    oracle.write_folder(tmp_path, config, first)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is stored unlike .*alike"):
        load(tmp_path)


def test_a_dtype_that_cannot_compute_is_refused(folder):
    with pytest.raises(ShapeError, match="dtype is 'int8', expected bfloat16, float16"):
        load(folder, dtype="int8")


def test_a_hub_id_is_fetched(folder, monkeypatch):
    asked = []

    def download(repo: str, **options):
        asked.append((repo, options["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.find("owner/name-1.5B", revision="main") == folder
    assert asked == [("owner/name-1.5B", "main")]


def test_the_hub_is_asked_only_where_nothing_local_is_meant(
    folder, tmp_path, monkeypatch
):
    asked = []

    def download(repo: str, **options):
        asked.append((repo, options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv(hub.OFFLINE, "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        CheckpointError, match="runs is, so a path seems .*hf://runs/typo"
    ):
        hub.find("runs/typo")
    with pytest.raises(
        CheckpointError, match="hf://a/b/c|a/b/c is no folder and no hub"
    ):
        hub.find("hf://a/b/c")
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(CheckpointError, match="fifo.gguf is no folder and no hub id"):
        hub.find("fifo.gguf")
    assert asked == []
    assert hub.find("hf://runs/typo") == hub.find("hub:runs/typo") == folder
    monkeypatch.setenv(hub.OFFLINE, "1")
    hub.find("owner/name")
    assert asked == [("runs/typo", False)] * 2 + [("owner/name", True)]


def test_offline_says_what_is_not_here(monkeypatch):
    def download(*_, **__):
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv(hub.OFFLINE, "1")
    with pytest.raises(CheckpointError, match="was not downloaded before.*--offline"):
        hub.find("owner/name")


def test_a_hub_that_does_not_answer_says_so(monkeypatch):
    def download(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        CheckpointError, match="owner/name is no local folder.*no route"
    ):
        hub.find("owner/name")


@pytest.mark.slow
def test_every_model_in_the_shared_folder_can_be_opened(shared):
    for name in ("stories260k", "stories15m"):
        source = open_source(shared / "models" / name)
        config = source.config
        family, stored = source.family, source.stored
        assert family.MODEL_TYPE == "llama" and stored is None
        assert config.tie_word_embeddings
    loaded, tokenizer = load(shared / "models/stories260k", QuantConfig())
    assert tokenizer.vocab_size == loaded.config.vocab_size == 512
