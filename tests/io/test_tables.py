"""4-bit embeddings and heads: loaded, trained through, merged, saved, told apart."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig, attach, merge, split
from qlora_jax.adapters.fingerprint import difference, fingerprint
from qlora_jax.errors import CheckpointError, ConfigError, ShapeError
from qlora_jax.io.hf import save_model
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.nn import Embedding, Linear, QuantizedEmbedding, QuantizedLinear

TABLES = {"embedding": "4bit", "head": "4bit"}
ORDER = 2e-5
"""Absolute, of logits of size 10: float32 sums in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tables") / "base")


def test_tables_are_quantized_as_they_load(folder: Path):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    plain, _ = qlora.load(folder, qlora.QuantConfig(), "float32")
    assert isinstance(plain.embed_tokens, Embedding)
    assert isinstance(plain.lm_head, Linear)
    # What it says is what the decoded tables say.
    decoded = merge(tiny.adapted(model, zero=True, targets="q_proj"), dtype="float32")
    said, wanted = (tiny.logits(m, tiny.tokens()) for m in (model, decoded))
    np.testing.assert_allclose(said, wanted, atol=ORDER, rtol=0)
    assert not np.allclose(said, tiny.logits(plain, tiny.tokens()), atol=0.1)


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


def test_an_adapter_goes_between_bases_with_and_without(folder, tmp_path):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    plain, _ = qlora.load(folder, qlora.QuantConfig(), "float32")
    adapted = tiny.adapted(model)
    qlora.save_adapter(tmp_path / "a", split(adapted)[1], LoRAConfig(rank=4, alpha=8.0))
    assert qlora.load_adapter(tmp_path / "a", plain)
    other = tiny.decoder(seed=1)
    import json

    ours, theirs = (json.loads(str(fingerprint(m))) for m in (model, other))
    assert "other weights" in str(difference(ours, theirs))


def test_rows_and_head_train_on_them(folder: Path):
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
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


def test_a_tied_head_goes_with_the_embedding(tmp_path: Path):
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    save_model(model, tmp_path / "tied")
    loaded, _ = qlora.load(
        tmp_path / "tied", qlora.QuantConfig(), "float32", embedding="4bit"
    )
    assert loaded.lm_head is None and isinstance(loaded.head, QuantizedLinear)
    assert np.isfinite(tiny.logits(loaded, tiny.tokens())).all()


def test_what_cannot_be_says_so(folder: Path):
    with pytest.raises(CheckpointError, match="stays dense, so its embedding and head"):
        qlora.load(folder, head="4bit")
    model, _ = qlora.load(folder, qlora.QuantConfig(), "float32", **TABLES)
    with pytest.raises(
        ShapeError, match="embedding is quantized and cannot take new rows"
    ):
        resize_tokens(model, 400)
    with pytest.raises(ConfigError, match="embed_tokens is quantized, and only dense"):
        attach(model, LoRAConfig(modules_to_save="embed_tokens"), key=jax.random.key(0))
