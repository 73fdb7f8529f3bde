"""Adapters, live: ours open in PEFT, and PEFT's in ours, on dense and 4-bit bases."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax import QuantConfig
from qlora_jax.adapters.names import flatten
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.objectives import SFT

pytestmark = [pytest.mark.interop, pytest.mark.rotates]

ORDER = 3e-5
"""Absolute, of logits of size 10: float32 sums in another order."""
GRADIENTS = 1e-4
"""Relative to the largest of a parameter: the same, through backward."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, patterns": {
        "rslora": True,
        "rank_pattern": {"down_proj": 8, "layers.attn.v_proj": 2},
        "alpha_pattern": {"q_proj": 3.0},
    },
    "dora": {"dora": True, "targets": "q_proj,down_proj"},
    "bias": {"bias": "all", "targets": "q_proj"},
    "bias of the adapted": {"bias": "lora_only", "targets": "q_proj,v_proj"},
    "saved": {"modules_to_save": "embed_tokens,lm_head,norm", "targets": "v_proj"},
    "norms": {"modules_to_save": "layers.mlp_norm", "targets": "v_proj"},
    "embedding and head": {"targets": "embed_tokens,lm_head,q_proj"},
    "tokens": {"tokens": (9, 3), "targets": "q_proj"},
    "some layers": {"layers": (1,), "targets": "q_proj,up_proj"},
}
TIED: dict[str, dict[str, Any]] = {
    "saved": {"modules_to_save": "embed_tokens"},
    "saved apart": {"modules_to_save": "embed_tokens", "tied": False},
    "head alone": {"modules_to_save": "lm_head"},
    "tokens": {"tokens": (3, 9)},
}
THEIRS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "whole names": {
        "target_modules": [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    },
    "regex": {"target_modules": r".*\.(1)\.self_attn\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "lora_alpha": 6,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r".*\.self_attn\.q_proj": 9},
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layers": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "dora": {"target_modules": ["o_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "ranks and alphas by layer": {
        "target_modules": ["q_proj", "down_proj"],
        "lora_alpha": 6,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "0.mlp.down_proj": 7},
        "alpha_pattern": {r"model\.layers\.0\.mlp\.down_proj": 3},
    },
    "dora, other layers by linear": {
        "target_modules": r".*\.(0.self_attn.q_proj|1.mlp.(up|gate)_proj|mlp.down_proj)",
        "rank_pattern": {"1.mlp.down_proj": 2},
        "use_dora": True,
    },
    "alpha below 0": {"target_modules": ["q_proj", "o_proj"], "lora_alpha": -3},
    "alpha 0": {
        "target_modules": ["q_proj"],
        "alpha_pattern": {"0.self_attn.q_proj": 0},
    },
    "a norm of one layer": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["layers.1.input_layernorm"],
    },
    "biases of some layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "bias": "lora_only",
    },
}
THEIRS_TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both, tied": {
        "target_modules": ["lm_head", "embed_tokens"],
        "ensure_weight_tying": True,
    },
}


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=ORDER, rtol=0)


def same_in_peft(
    side: Any, model: Decoder, base: Path, ids: Path, out: Path, **more: Any
) -> None:
    """Compares the logits of a model with those of its exported adapter in PEFT."""
    adapter = qlora.export_peft(out / "adapter", model)
    job = {"base": base, "adapter": adapter, "ids": ids, "out": out / "theirs.npz"}
    side("logits", **job, **more)
    close(tiny.logits(model, np.load(ids)), np.load(out / "theirs.npz")["logits"])


@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_opens_in_peft(side, bases, ids, tmp_path, kind):
    # Of a model with biases, whose head is its own but for those that say otherwise.
    base = untied(side, bases, tmp_path)
    model, _ = qlora.load(base, dtype="float32")
    adapted = tiny.moved(model, **KINDS[kind])
    moved = tiny.logits(adapted, np.load(ids)) - tiny.logits(model, np.load(ids))
    assert np.abs(moved).max() > 0.1
    same_in_peft(side, adapted, base, ids, tmp_path)


def untied(side: Any, bases: dict[str, Path], out: Path) -> Path:
    """Makes a Qwen2 whose head is not its embedding."""
    model, _ = qlora.load(bases["qwen2"], dtype="float32")
    own = tiny.moved(model, modules_to_save="lm_head", targets="v_proj")
    qlora.save_model(
        qlora.merge(own, dtype="float32"), out / "b", source=bases["qwen2"]
    )
    return out / "b"


@pytest.mark.parametrize("kind", TIED)
def test_our_adapter_on_a_tied_base_opens_in_peft(side, bases, ids, tmp_path, kind):
    model, _ = qlora.load(bases["qwen2"], dtype="float32")
    adapted = tiny.moved(model, targets="q_proj", **TIED[kind])
    same_in_peft(side, adapted, bases["qwen2"], ids, tmp_path)


def test_our_adapter_of_new_tokens_opens_in_peft(side, bases, ids, tmp_path):
    model, _ = qlora.load(bases["qwen2"], dtype="float32")
    rows = model.config.vocab_size + 2
    larger = resize_tokens(model, rows)
    adapted = tiny.moved(larger, targets="q_proj", tokens=(rows - 1, rows - 2))
    new = np.load(ids).copy()
    new[:, 3] = rows - 1
    np.save(tmp_path / "new.npy", new)
    base = bases["qwen2"]
    same_in_peft(side, adapted, base, tmp_path / "new.npy", tmp_path, rows=rows)


@pytest.fixture(scope="module")
def four_bit(bases, tmp_path_factory) -> Path:
    """The tiny Llama in 4 bits, as we write it."""
    folder = tmp_path_factory.mktemp("four_bit") / "llama"
    model, _ = qlora.load(bases["llama"], QuantConfig(), "float32")
    qlora.save_model(model, folder, source=bases["llama"])
    return folder


@pytest.mark.parametrize("kind", ["plain", "rslora, patterns", "dora", "saved"])
def test_our_adapter_on_a_4_bit_base_opens_in_peft(side, four_bit, ids, tmp_path, kind):
    model, _ = qlora.load(four_bit, dtype="float32")
    same_in_peft(side, tiny.moved(model, **KINDS[kind]), four_bit, ids, tmp_path)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("held", ["dense", "4-bit"])
def test_an_adapter_of_peft_opens_in_ours(
    side, bases, four_bit, ids, tmp_path, kind, held
):
    base = bases["qwen2"] if held == "dense" else four_bit
    out = tmp_path / "theirs"
    side("adapter", base=base, config={"r": 4} | THEIRS[kind], ids=ids, out=out)
    model, _ = qlora.load(base, dtype="float32")
    adapted = qlora.import_peft(out, model)
    close(tiny.logits(adapted, np.load(ids)), np.load(out / "logits.npz")["logits"])
    # And back: what goes out again is taken by PEFT as it was.
    same_in_peft(side, adapted, base, ids, tmp_path)


@pytest.mark.parametrize("kind", THEIRS_TIED)
def test_an_adapter_of_peft_on_a_tied_head_opens_in_ours(
    side, bases, ids, tmp_path, kind
):
    base, out = bases["qwen2"], tmp_path / "theirs"
    side("adapter", base=base, config={"r": 4} | THEIRS_TIED[kind], ids=ids, out=out)
    model, _ = qlora.load(base, dtype="float32")
    adapted = qlora.import_peft(out, model)
    close(tiny.logits(adapted, np.load(ids)), np.load(out / "logits.npz")["logits"])
    same_in_peft(side, adapted, base, ids, tmp_path)


def test_loss_and_gradients_of_a_4_bit_step_are_those_of_peft(
    side, four_bit, ids, tmp_path
):
    model, _ = qlora.load(four_bit, dtype="float32")
    adapted = tiny.moved(model)
    adapter = qlora.export_peft(tmp_path / "a", adapted)
    job = {"base": four_bit, "adapter": adapter, "ids": ids, "grads": True}
    side("logits", out=tmp_path / "theirs.npz", **job)
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    graphdef, lora, rest = qlora.split(adapted)
    tokens = jnp.asarray(np.load(ids))
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    count = tokens.size - len(tokens)

    @jax.jit
    def step(lora, rest):
        def loss(lora):
            model = qlora.join(graphdef, lora, rest)
            return SFT(model, batch)[0] / count

        return jax.value_and_grad(loss)(lora)

    value, grads = step(lora, rest)
    close(value, theirs["loss"])
    ours = flatten(grads)
    names = {name for name in theirs if name.startswith("grad:")}
    assert len(names) == len(ours) == 2 * 7 * 2
    for key in names:
        name = key.removeprefix("grad:base_model.model.model.").removesuffix(".weight")
        name = name.replace(".self_attn.", ".attn.")
        name = name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")
        grad = theirs[key].T
        largest = np.abs(grad).max()
        assert largest > 0
        np.testing.assert_allclose(ours[name], grad, atol=GRADIENTS * largest, rtol=0)
