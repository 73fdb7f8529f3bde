"""Both ways, live: transformers, bitsandbytes and PEFT open ours, and we open theirs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.adapters import LoRAConfig, attach, join, merge, split
from qlora_jax.adapters.names import flatten
from qlora_jax.io.hf import save_model
from qlora_jax.io.peft import export_peft, import_peft
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.nn import quantize
from qlora_jax.quant import QuantConfig
from qlora_jax.train.step import next_token_loss

pytestmark = pytest.mark.interop

ORDER = 3e-5
"""Absolute, of logits of size 10: float32 sums in another order."""
GRADIENTS = 1e-4
"""Relative to the largest of a parameter."""
QUANTS = {
    "nf4_dq": QuantConfig(),
    "nf4": QuantConfig(double_quant=False),
    "fp4_dq": QuantConfig(codebook="fp4"),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, patterns": {
        "rslora": True,
        "rank_pattern": {"down_proj": 8, "layers.attn.v_proj": 2},
        "alpha_pattern": {"q_proj": 3.0},
    },
    "dora": {"dora": True, "targets": "q_proj,down_proj"},
    "bias": {"bias": "all", "targets": "q_proj"},
    "saved": {"modules_to_save": "embed_tokens,lm_head,norm", "targets": "v_proj"},
    "norms": {"modules_to_save": "layers.mlp_norm", "targets": "v_proj"},
    "embedding and head": {"targets": "embed_tokens,lm_head,q_proj"},
    "tokens": {"tokens": (9, 3), "targets": "q_proj"},
    "some layers": {"layers": (1,), "targets": "q_proj,up_proj"},
}


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.asarray(tiny.tokens(2, 11)))
    return tmp_path / "ids.npy"


def base_folder(out: Path, bias: bool = True) -> Path:
    """Writes the tiny base as Qwen2, which has biases on q, k and v alone."""
    save_model(tiny.decoder(bias=bias), out)
    settings = json.loads((out / "config.json").read_text())
    settings |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    settings["use_sliding_window"] = False
    (out / "config.json").write_text(json.dumps(settings))
    return out


def drawn(model: Decoder, **config: Any) -> Decoder:
    """Returns a model with an adapter of a kind, every value of it moved."""
    config = {"rank": 4, "alpha": 6.0} | config
    graphdef, lora, base = split(
        attach(model, LoRAConfig(**config), key=jax.random.key(1))
    )
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), lora
    )
    return join(graphdef, moved, base)


def said(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=ORDER, rtol=0)


def test_our_adapters_of_every_kind_open_in_peft(side, ids, tmp_path):
    base = base_folder(tmp_path / "base")
    model, _ = qlora.load(base, dtype="float32")
    jobs, wanted = [], {}
    for kind, config in KINDS.items():
        adapted = drawn(model, **config)
        wanted[kind] = tiny.logits(adapted, np.load(ids))
        adapter = export_peft(tmp_path / kind, adapted)
        out = tmp_path / f"{kind}.npz"
        jobs.append(
            {"do": "logits", "base": base, "adapter": adapter, "ids": ids, "out": out}
        )
    side(jobs)
    for kind, logits in wanted.items():
        close(said(tmp_path / f"{kind}.npz")["logits"], logits)


def test_adapters_on_a_tied_base_and_of_new_tokens_open_in_peft(side, ids, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    model = Decoder(config, key=jax.random.key(0), dtype="float32")
    save_model(model, tmp_path / "base")
    larger = resize_tokens(model, 274)
    new = np.asarray(np.load(ids))
    new[:, 3] = 273
    np.save(tmp_path / "new.npy", new)
    cases = {
        "tied": (model, {"modules_to_save": "embed_tokens"}, {}),
        "untied": (model, {"modules_to_save": "embed_tokens", "tied": False}, {}),
        "head": (model, {"modules_to_save": "lm_head"}, {}),
        "rows": (model, {"tokens": (3, 9)}, {}),
        "new": (
            larger,
            {"tokens": (273, 272)},
            {"rows": 274, "ids": tmp_path / "new.npy"},
        ),
    }
    jobs, wanted = [], {}
    for name, (start, changes, more) in cases.items():
        adapted = drawn(start, targets="q_proj", **changes)
        job = {
            **{"do": "logits", "base": tmp_path / "base", "ids": ids},
            **{"adapter": export_peft(tmp_path / name, adapted)},
            **{"out": tmp_path / f"{name}.npz", **more},
        }
        wanted[name] = tiny.logits(adapted, np.load(job["ids"]))
        jobs.append(job)
    side(jobs)
    for name, logits in wanted.items():
        close(said(tmp_path / f"{name}.npz")["logits"], logits)


def test_peft_adapters_open_in_ours(side, ids, tmp_path):
    base = base_folder(tmp_path / "base")
    configs = {
        "names": {"target_modules": ["q_proj", "down_proj"], "r": 4},
        "regex": {"target_modules": r".*\.(1)\.self_attn\.(q|o)_proj", "r": 4},
        "all-linear": {"target_modules": "all-linear", "r": 4, "use_rslora": True},
        "patterns": {
            **{"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6},
            **{"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        },
        "dora": {"target_modules": ["o_proj"], "r": 4, "use_dora": True},
    }
    side(
        {
            **{"do": "adapter", "base": base, "config": config},
            **{"ids": ids, "out": tmp_path / name},
        }
        for name, config in configs.items()
    )
    model, _ = qlora.load(base, dtype="float32")
    for name in configs:
        ours = tiny.logits(import_peft(tmp_path / name, model), np.load(ids))
        close(ours, said(tmp_path / name / "logits.npz")["logits"])


def test_our_4_bit_folders_open_in_bitsandbytes(side, ids, tmp_path):
    jobs = []
    base = base_folder(tmp_path / "base")
    models = {}
    for name, quant in QUANTS.items():
        models[name], _ = qlora.load(base, quant, "float32")
        save_model(models[name], tmp_path / name, source=base)
        for do in ("decoded", "logits"):
            out = tmp_path / f"{name}.{do}.npz"
            jobs.append({"do": do, "base": tmp_path / name, "ids": ids, "out": out})
    side(jobs)
    for name, model in models.items():
        weights = said(tmp_path / f"{name}.decoded.npz")
        assert len(weights) == 2 * 7
        ours = model.layers.mlp.up_proj.weight("float32")
        for i in range(2):
            theirs = weights[f"model.layers.{i}.mlp.up_proj.weight"]
            np.testing.assert_array_equal(ours[i], theirs)
        logits = said(tmp_path / f"{name}.logits.npz")["logits"]
        close(tiny.logits(model, np.load(ids)), logits)


def test_bitsandbytes_folders_open_in_ours(side, ids, tmp_path):
    base, jobs = base_folder(tmp_path / "base"), []
    for name, quant in QUANTS.items():
        job = {"base": base, "out": tmp_path / name, "codebook": quant.codebook}
        jobs.append({"do": "quantize", "double_quant": quant.double_quant, **job})
        for do in ("decoded", "logits"):
            out = tmp_path / f"{name}.{do}.npz"
            jobs.append({"do": do, "base": tmp_path / name, "ids": ids, "out": out})
    side(jobs)
    for name, quant in QUANTS.items():
        model, _ = qlora.load(tmp_path / name, dtype="float32")
        q = model.layers.attn.k_proj.quantized
        assert (q.codebook, q.double_quant) == (quant.codebook, quant.double_quant)
        weights = said(tmp_path / f"{name}.decoded.npz")
        ours = model.layers.attn.k_proj.weight("float32")
        for i in range(2):
            theirs = weights[f"model.layers.{i}.self_attn.k_proj.weight"]
            np.testing.assert_array_equal(ours[i], theirs)
        logits = said(tmp_path / f"{name}.logits.npz")["logits"]
        close(tiny.logits(model, np.load(ids)), logits)


def test_loss_and_gradients_of_a_4_bit_step_are_those_of_peft(side, ids, tmp_path):
    base = base_folder(tmp_path / "base")
    model, _ = qlora.load(base, QuantConfig(), "float32")
    save_model(model, tmp_path / "q", source=base)
    adapted = drawn(model)
    adapter = export_peft(tmp_path / "a", adapted)
    job = {"base": tmp_path / "q", "adapter": adapter, "ids": ids, "grads": True}
    side([{"do": "logits", "out": tmp_path / "out.npz", **job}])
    theirs = said(tmp_path / "out.npz")
    graphdef, lora, rest = split(adapted)
    tokens = jnp.asarray(np.load(ids))
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    count = tokens.size - len(tokens)

    def loss(lora):
        return next_token_loss("none")(join(graphdef, lora, rest), batch, None) / count

    value, grads = jax.value_and_grad(loss)(lora)
    close(value, theirs["loss"])
    ours = flatten(grads)
    names = {k: v for k, v in theirs.items() if "grad:" in k}
    assert len(names) == len(ours) == 2 * 7 * 2
    for key, grad in names.items():
        name = key.removeprefix("grad:base_model.model.model.").removesuffix(".weight")
        name = name.replace(".self_attn.", ".attn.")
        name = name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")
        size = GRADIENTS * np.abs(grad).max()
        np.testing.assert_allclose(ours[name], grad.T, atol=size, rtol=0)


def test_merged_folders_open_in_transformers(side, ids, tmp_path):
    base = base_folder(tmp_path / "base")
    model, _ = qlora.load(base, QuantConfig(), "float32")
    merged = merge(drawn(model), dtype="float32")
    save_model(merged, tmp_path / "whole", source=base)
    save_model(merged, tmp_path / "shards", source=base, shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)
    tied = Decoder(config, key=jax.random.key(0), dtype="float32")
    merged_tied = merge(drawn(quantize(tied)), dtype="float32")
    save_model(merged_tied, tmp_path / "tied")
    names = ("whole", "shards", "tied")
    side(
        {"do": "logits", "base": tmp_path / n, "ids": ids, "out": tmp_path / f"{n}.npz"}
        for n in names
    )
    for name in names:
        theirs = said(tmp_path / f"{name}.npz")
        ours = merged_tied if name == "tied" else merged
        close(tiny.logits(ours, np.load(ids)), theirs["logits"])
        assert bool(theirs["tied"]) == (name == "tied")
