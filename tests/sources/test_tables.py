"""Quantized embeddings and heads: loaded, trained through, merged, saved, told apart."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from models.family_folders import load, read
from safetensors.numpy import save_file

import qlora_jax as qlora
from pallas_kernels.formats import Int8Rows
from qlora_jax.adapters import LoRAConfig, attach, merge, split
from qlora_jax.adapters.fingerprint import difference, fingerprint
from qlora_jax.errors import CheckpointError, ConfigError, ShapeError
from qlora_jax.exchange.ours import misfits
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.nn import (
    Embedding,
    Linear,
    LoRAEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
)
from qlora_jax.nn.packing import dequantize
from qlora_jax.sources.load import outline
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.save import save_model

TABLES = {"embedding": "4bit", "head": "4bit"}
INT8: Any = {"embedding": "int8", "head": "int8"}
BOTH = pytest.mark.parametrize("tables", [TABLES, INT8], ids=["4bit", "int8"])
ORDER = 2e-5
"""Absolute, of logits of size 10: float32 sums in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tables") / "base")


@pytest.mark.slow
@BOTH
def test_tables_are_quantized_as_they_load(folder: Path, tables):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **tables)
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    plain, _ = qlora.load(folder, qlora.QuantConfig(), "float32")
    assert isinstance(plain.embed_tokens, Embedding)
    assert isinstance(plain.lm_head, Linear)
    # What it says is what the decoded tables say.
    decoded = merge(tiny.adapted(model, zero=True, targets="q_proj"), dtype="float32")
    said, wanted = (tiny.logits(m, tiny.tokens()) for m in (model, decoded))
    np.testing.assert_allclose(said, wanted, atol=ORDER, rtol=0)
    wrong = np.abs(said - tiny.logits(plain, tiny.tokens())).max()
    assert wrong > 0.1 if tables is TABLES else 1e-3 < wrong < 0.1


def test_a_4_bit_folder_takes_them_too(folder: Path, tmp_path: Path):
    save_model(tiny.quantized(), tmp_path / "q")
    model, _ = qlora.load(tmp_path / "q", dtype="float32", **TABLES)
    again, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    for one, other in zip(tiny.frozen(model), tiny.frozen(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_they_are_saved_dense_where_other_tools_want_them(folder, tmp_path):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    save_model(model, tmp_path / "out", source=folder)
    back, _ = qlora.load(tmp_path / "out", dtype="float32")
    assert isinstance(back.lm_head, Linear)
    np.testing.assert_allclose(
        tiny.logits(back, tiny.tokens()),
        tiny.logits(model, tiny.tokens()),
        atol=ORDER,
        rtol=0,
    )


@BOTH
def test_an_adapter_goes_between_bases_with_and_without(folder, tmp_path, tables):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **tables)
    plain, _ = qlora.load(folder, qlora.QuantConfig(), "float32")
    adapted = tiny.adapted(model)
    qlora.save_adapter(tmp_path / "a", split(adapted)[1], LoRAConfig(rank=4, alpha=8.0))
    loaded = qlora.load_adapter(tmp_path / "a", plain)
    for one, kept in zip(
        tiny.arrays(split(loaded)[1]), tiny.arrays(split(adapted)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, kept)
    other = tiny.decoder(seed=1)
    ours, theirs = (json.loads(str(fingerprint(m))) for m in (model, other))
    assert "other weights" in str(difference(ours, theirs))


@pytest.mark.slow
@BOTH
def test_rows_and_head_say_on_them_what_they_say_merged(folder: Path, tables):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **tables)
    config = {"targets": "q_proj,lm_head,embed_tokens"}
    said = tiny.logits(tiny.adapted(model, **config), tiny.tokens())
    merged = merge(tiny.adapted(model, **config), dtype="float32")
    np.testing.assert_allclose(
        said, tiny.logits(merged, tiny.tokens()), atol=ORDER, rtol=0
    )
    rows = tiny.adapted(model, targets="q_proj", tokens=(5, 3))
    before = tiny.logits(tiny.adapted(model, targets="q_proj"), tiny.tokens())
    np.testing.assert_allclose(
        tiny.logits(rows, tiny.tokens()), before, atol=ORDER, rtol=0
    )


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "config",
    [
        {"targets": "q_proj,lm_head,embed_tokens"},
        {"targets": "q_proj", "tokens": (5, 3)},
    ],
    ids=["factors", "rows"],
)
def test_rows_and_head_train_on_them(folder: Path, tables, config):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **tables)
    graphdef, lora, base = split(tiny.adapted(model, **config))
    before, frozen = tiny.arrays(lora), tiny.arrays(base)
    tx, losses = optax.adam(1e-2), []
    step, state = qlora.make_train_step(graphdef, tx), tx.init(lora)
    tokens = tiny.tokens().at[:, 2:4].set(jnp.asarray([5, 3]))
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    for _ in range(3):
        lora, state, metrics = step(lora, base, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    for one, other in zip(tiny.arrays(lora), before, strict=True):
        assert (one != other).any()
    for one, other in zip(tiny.arrays(base), frozen, strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_a_tied_head_goes_with_the_embedding(tmp_path: Path, tables):
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    save_model(model, tmp_path / "tied")
    loaded, _ = qlora.load(
        tmp_path / "tied", qlora.QuantConfig(), "float32", embedding=tables["embedding"]
    )
    assert loaded.lm_head is None and isinstance(loaded.head, QuantizedLinear)
    # As a model that has the decoded table for both.
    table = loaded.embed_tokens.weight.get_value()
    tensors = dict(Checkpoint(tmp_path / "tied"))
    tensors["model.embed_tokens.weight"] = np.asarray(dequantize(table, "float32"))
    shutil.copytree(tmp_path / "tied", tmp_path / "decoded")
    save_file(tensors, tmp_path / "decoded" / "model.safetensors")
    plain, _ = qlora.load(tmp_path / "decoded", qlora.QuantConfig(), "float32")
    said, wanted = (tiny.logits(m, tiny.tokens()) for m in (loaded, plain))
    np.testing.assert_allclose(said, wanted, atol=ORDER, rtol=0)


def test_a_per_layer_table_that_is_targeted_is_said_to_take_no_adapter(
    golden, tmp_path, caplog
):
    case = "gemma4_text_told"
    model = load(case, read(case, golden), tmp_path)
    adapted = tiny.adapted(model, targets=".*(embed_tokens.*|q_proj)")
    assert "embed_tokens_per_layer, which takes no adapter" in caplog.text
    assert isinstance(adapted.per_layer.embed_tokens_per_layer, Embedding)
    assert isinstance(adapted.embed_tokens, LoRAEmbedding)


def test_per_layer_embeddings_go_with_the_embedding(golden, tmp_path):
    case = "gemma4_text_told"
    made, (dense, base, out) = read(case, golden), (tmp_path / x for x in "abc")
    dense.mkdir()
    base.mkdir()
    plain = load(case, made, dense)
    model = load(case, made, base, qlora.QuantConfig(), embedding="int8")
    tables = [m.per_layer.embed_tokens_per_layer for m in (model, plain)]
    held = tables[0].weight.get_value()
    assert isinstance(held, Int8Rows) and isinstance(tables[1], Embedding)
    np.testing.assert_allclose(held.decode("float32"), tables[1].weight[...], atol=0.03)
    save_model(model, out, source=base)
    again, _ = qlora.load(out, dtype="float32")
    for one, other in zip(tiny.frozen(model), tiny.frozen(again), strict=True):
        np.testing.assert_array_equal(one, other)
    # New tokens are in it too, as what any other base takes for them.
    larger = resize_tokens(plain, 120, {99: [3], 110: [3, 4]})
    rows = larger.per_layer.embed_tokens_per_layer.weight[...]
    assert len(rows) == larger.config.per_layer_vocab == 120
    np.testing.assert_array_equal(rows[:100], tables[1].weight[...])
    np.testing.assert_allclose(rows[110], rows[:100].mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match="embedding is quantized and cannot take"):
        resize_tokens(model, 120)


def test_what_cannot_be_says_so(folder: Path):
    with pytest.raises(CheckpointError, match="stays dense, so its embedding and head"):
        qlora.load(folder, head="4bit")
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    with pytest.raises(
        ShapeError, match="embedding is quantized and cannot take new rows"
    ):
        resize_tokens(model, 400)
    with pytest.raises(ConfigError, match="embed_tokens is quantized, and only dense"):
        attach(
            model, LoRAConfig(modules_to_save=("embed_tokens",)), key=jax.random.key(0)
        )


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder whose linears are 4-bit and whose tables are int8."""
    out = tmp_path_factory.mktemp("int8") / "stored"
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **INT8)
    save_model(model, out, source=folder)
    return out


def test_int8_tables_come_back_bit_for_bit(folder: Path, stored: Path, tmp_path: Path):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **INT8)
    for asked in ({}, INT8):
        back, _ = qlora.load(stored, dtype="float32", **asked)
        assert isinstance(back.embed_tokens.weight.get_value(), Int8Rows)
        for one, other in zip(tiny.frozen(model), tiny.frozen(back), strict=True):
            np.testing.assert_array_equal(one, other)
    save_model(back, tmp_path / "again", source=stored)
    first, second = (
        {name: tensors[name] for name in tensors}
        for tensors in map(Checkpoint, (stored, tmp_path / "again"))
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor)
    assert misfits_of(stored, model, tmp_path) == []


def misfits_of(folder: Path, model: Decoder, tmp_path: Path) -> list[str]:
    lora = split(tiny.adapted(model))[1]
    qlora.save_adapter(tmp_path / "a", lora, LoRAConfig(rank=4, alpha=8.0))
    return misfits(tmp_path / "a", outline(folder).model)


def test_int8_tables_mean_what_bitsandbytes_int8_rows_do(folder: Path, stored: Path):
    tensors, original = Checkpoint(stored), Checkpoint(folder)
    for module in ("model.embed_tokens", "lm_head"):
        codes, scb = tensors[f"{module}.weight"], tensors[f"{module}.SCB"]
        assert codes.dtype == np.int8 and scb.dtype == np.float32
        w = np.asarray(original[f"{module}.weight"], np.float64)
        wrong = np.abs(codes * np.float64(scb[:, None]) / 127 - w)
        assert (wrong <= 0.5001 * scb[:, None] / 127).all()


def test_other_tools_are_not_told_that_they_know_the_folder(stored: Path):
    hf = json.loads((stored / "config.json").read_text())
    settings = hf["quantization_config"]
    assert settings["quant_method"] == "qlora_jax_int8_tables"
    assert not settings.keys() & {"load_in_4bit", "load_in_8bit"}
    assert settings["int8_tables"] == ["model.embed_tokens", "lm_head"]
    assert settings["linears"]["quant_method"] == "bitsandbytes"


def test_stored_int8_tables_merge_into_dense_ones(stored: Path, tmp_path: Path):
    model, _ = qlora.load(stored, dtype="float32")
    adapted = tiny.adapted(model)
    merged = merge(adapted, dtype="float32")
    save_model(merged, tmp_path / "merged", source=stored)
    back, _ = qlora.load(tmp_path / "merged", dtype="float32")
    assert isinstance(back.embed_tokens, Embedding) and isinstance(back.lm_head, Linear)
    np.testing.assert_allclose(
        tiny.logits(back, tiny.tokens()),
        tiny.logits(adapted, tiny.tokens()),
        atol=ORDER,
        rtol=0,
    )
    again = merge(adapted, requantize=qlora.QuantConfig())
    assert isinstance(again.embed_tokens, QuantizedEmbedding)
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )


def changed(stored: Path, out: Path, name: str, change: Any) -> Path:
    """Copies a folder with one tensor changed, or left out where `change` gives None."""
    shutil.copytree(stored, out)
    tensors = Checkpoint(stored)
    flat = {key: np.array(tensors[key]) for key in tensors}
    value = change(flat.pop(name))
    flat |= {} if value is None else {name: value}
    save_file(flat, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("lm_head.SCB", lambda x: None, "lm_head.SCB is missing"),
        ("lm_head.SCB", lambda x: x[:-1], r"lm_head.SCB has shape \(271,\)"),
        ("lm_head.SCB", lambda x: x * np.float32(np.nan), "NaN or Inf in its scales"),
        ("lm_head.weight", lambda x: x - (x == x.min()) * np.int8(1), "a code of -128"),
        ("lm_head.weight", lambda x: x.astype("f4"), "lm_head.weight is float32"),
    ],
)
def test_damaged_int8_tables_are_named(stored, tmp_path, name, change, match):
    with pytest.raises(CheckpointError, match=match):
        qlora.load(changed(stored, tmp_path / "damaged", name, change))


def test_int8_codes_are_never_taken_for_values(stored: Path, tmp_path: Path):
    shutil.copytree(stored, tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    hf = json.loads(path.read_text())
    hf["quantization_config"] = hf["quantization_config"]["linears"]
    path.write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match="int8 values, of which config.json says"):
        qlora.load(tmp_path / "plain")


def test_what_int8_tables_cannot_be_says_so(folder: Path, stored: Path):
    with pytest.raises(
        CheckpointError, match="head is stored in int8 and cannot become"
    ):
        qlora.load(stored, head="4bit")
    with pytest.raises(CheckpointError, match="stays dense, so its embedding and head"):
        qlora.load(folder, embedding="int8")
    model, _ = qlora.load(stored, dtype="float32")
    with pytest.raises(ShapeError, match="embedding is quantized and cannot take new"):
        resize_tokens(model, 400)
    with pytest.raises(ConfigError, match="lm_head is quantized, and only dense"):
        attach(model, LoRAConfig(modules_to_save=("lm_head",)), key=jax.random.key(0))
