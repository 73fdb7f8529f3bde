"""PEFT's adapters of every kind (tests/golden/peft): its logits, loss and gradients, and
there and back in both formats. Made by scripts/make/golden_peft.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters import join, merge, split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.names import flatten
from qlora_jax.exchange.ours import load_adapter, save_adapter
from qlora_jax.exchange.peft import export_peft, import_peft
from qlora_jax.nn import FrozenParam, quantize
from qlora_jax.objectives import SFT
from qlora_jax.sources.load import load
from qlora_jax.sources.save import save_model

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
BASES = json.loads((GOLDEN / "index.json").read_text())["cases"]
LOGITS = 2e-5
"""Absolute, of logits of size 10; the order of float32 sums."""
GRADIENTS = 1e-4
"""Relative to the largest of a parameter."""


def opened(name: str) -> tuple[Any, dict[str, np.ndarray], jax.Array]:
    """Returns (model with the adapter, what PEFT said, token ids)."""
    model, _ = load(GOLDEN / BASES[name], dtype="float32")
    said = dict(np.load(GOLDEN / name / "golden.npz"))
    return import_peft(GOLDEN / name, model), said, jnp.asarray(said["ids"], jnp.int32)


def close(said: Any, wanted: Any, size: float) -> None:
    np.testing.assert_allclose(said, wanted, atol=size, rtol=0)


@pytest.mark.parametrize("name", BASES)
def test_logits_and_gradients_are_those_of_peft(name, tmp_path):
    model, said, ids = opened(name)
    graphdef, lora, base = split(model)
    batch = {"tokens": ids, "weights": jnp.ones(ids.shape, jnp.float32)}

    @jax.jit
    def value(lora, base):
        def loss(lora):
            model = join(graphdef, lora, base)
            return SFT(model, batch)[0], model(ids)

        return jax.value_and_grad(loss, has_aux=True)(lora)

    (total, logits), grads = value(lora, base)
    close(logits, said["logits"], LOGITS)
    count = ids.size - len(ids)
    close(total / count, said["loss"], LOGITS)
    # PEFT's gradients, read as the adapter that has these values.
    name_of = lambda key: key.removeprefix("grad:").replace("_vector.weight", "_vector")  # noqa: E731
    theirs = {name_of(key): x for key, x in said.items() if "grad:" in key}
    shutil.copytree(GOLDEN / name, tmp_path / "grads")
    save_file(theirs, tmp_path / "grads" / "adapter_model.safetensors")
    fresh, _ = load(GOLDEN / BASES[name], dtype="float32")
    wanted = flatten(split(import_peft(tmp_path / "grads", fresh))[1])
    ours = flatten(grads)
    assert ours.keys() == wanted.keys()
    for key, grad in wanted.items():
        largest = float(jnp.abs(grad).max())
        assert largest > 0, key
        close(ours[key] / count, grad, GRADIENTS * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_the_merged_model_says_the_same_and_is_saved(name, tmp_path):
    model, said, ids = opened(name)
    merged = merge(model, dtype="float32")
    close(tiny.logits(merged, ids), said["logits"], LOGITS)
    save_model(merged, tmp_path / "merged", source=GOLDEN / BASES[name])
    again, _ = load(tmp_path / "merged", dtype="float32")
    close(tiny.logits(again, ids), said["logits"], LOGITS)
    table = load_file(tmp_path / "merged" / "model.safetensors")
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert tied["tie_word_embeddings"] == ("lm_head.weight" not in table)
    assert tied["vocab_size"] == len(table["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", BASES)
def test_it_goes_out_as_it_came(name, tmp_path):
    model, _, _ = opened(name)
    out = export_peft(tmp_path / "out", model)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (out, GOLDEN / name)
    )
    # What PEFT saves beside an adapter: tables of the base, and a tied head's copy.
    beside = ("base_layer.weight", "original_module.weight", "modules_to_save.weight")
    tied = BASES[name] == "tied" and "lm_head.token_adapter"
    wanted = {
        k: v
        for k, v in theirs.items()
        if not k.endswith(beside) and not (tied and tied in k)
    }
    assert ours.keys() == wanted.keys()
    for key, array in wanted.items():
        assert ours[key].tobytes() == array.tobytes(), key
    settings, source = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (out, GOLDEN / name)
    )
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "bias"):
        assert settings[key] == source[key], key
    back = import_peft(out, load(GOLDEN / BASES[name], dtype="float32")[0])
    assert lora_config(back) == lora_config(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_our_own_folder_keeps_all_of_it(name, tmp_path):
    model, _, ids = opened(name)
    config = lora_config(model)
    save_adapter(tmp_path / "a", split(model)[1], config)
    # Onto the base as it is: rows for new tokens and an untied head are the adapter's.
    back = load_adapter(tmp_path / "a", load(GOLDEN / BASES[name], dtype="float32")[0])
    assert lora_config(back) == config
    np.testing.assert_array_equal(tiny.logits(back, ids), tiny.logits(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "some_layers_dora", "dora_rslora"])
def test_dora_on_4_bits_is_dora_on_the_decoded_weights(name):
    dense, _ = load(GOLDEN / BASES[name], dtype="float32")
    quantized = quantize(dense)
    decoded = merge_to_dense(quantized)
    ids = jnp.asarray(np.load(GOLDEN / name / "golden.npz")["ids"], jnp.int32)
    one, other = (import_peft(GOLDEN / name, base) for base in (quantized, decoded))
    close(tiny.logits(one, ids), tiny.logits(other, ids), LOGITS)
    merged = merge(one, dtype="float32")
    close(tiny.logits(merged, ids), tiny.logits(other, ids), LOGITS)


def merge_to_dense(quantized: Any) -> Any:
    """Returns a model of the decoded weights."""
    nothing = tiny.adapted(quantized, zero=True, targets="q_proj")
    return merge(nothing, dtype="float32")


def test_what_trains_of_the_base_is_frozen_again_by_merge():
    for name in ("saved", "bias_all", "tokens_both", "embedding_tied"):
        merged = merge(opened(name)[0], dtype="float32")
        variables = [v for _, v in split_free(merged)]
        assert variables and all(isinstance(v, FrozenParam) for v in variables)


def split_free(model: Any) -> list[tuple]:
    from flax import nnx

    return nnx.to_flat_state(nnx.state(model, nnx.Variable))


def test_the_config_of_an_imported_adapter_is_plain():
    said = {name: lora_config(opened(name)[0]) for name in BASES}
    assert said["dora"].dora and not said["dora"].rslora
    assert said["bias_all"].bias == "all"
    assert said["bias_lora_only"].bias == "lora_only"
    assert said["saved_final_norm"].modules_to_save == ("norm",)
    assert "layers.attn_norm" in said["saved"].modules_to_save
    assert not said["saved_embedding_untied_by_peft"].tied
    assert said["saved_embedding_tied"].tied
    assert said["tokens"].tokens == (60, 3) and said["tokens"].head_tokens == ()
    assert said["tokens_tied"].head_tokens is None
    assert said["tokens_both"].head_tokens == (7,)
    assert said["some_layers"].layers == (1,)
    assert said["embedding"].targets == ("embed_tokens", "layers.attn.q_proj")
    assert dataclasses.replace(said["some_layers_dora"], layers=()).dora
