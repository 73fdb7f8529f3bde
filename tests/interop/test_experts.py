"""Mixtures of experts, live. transformers 5 holds a layer's experts as two parameters,
gate_up_proj and down_proj, and bitsandbytes quantizes no parameters, linears alone.

PEFT 0.21.2 turns adapters of single experts into its own for such parameters; what it gets
wrong of them, and how export_peft writes around it, io/peft/write.py says.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from models import family_folders
from safetensors.numpy import load_file

import qlora_jax as qlora
from qlora_jax import QuantConfig
from qlora_jax.models import Decoder
from qlora_jax.nn import Linear, QuantizedLinear
from qlora_jax.nn.frozen import modules

pytestmark = [pytest.mark.interop, pytest.mark.rotates]

IDS = tiny.tokens(2, 11)
ORDER = 3e-5
"""Absolute, of logits of size 10: float32 sums in another order."""
FAMILIES = ("mixtral", "qwen3_moe")
MORE = (
    *("qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "glm4_moe"),
    *("minimax_m2", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    *("lfm2_moe", "granitemoehybrid"),
)
SAME: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "attention": {"targets": "q_proj,v_proj"},
    "experts": {"targets": "gate_proj,up_proj,down_proj"},
    "down_proj": {"targets": "down_proj"},
    "other ranks beside the experts": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3.0},
    },
    "some layers": {"layers": (1,)},
    # What PEFT has no place for goes into lora_b.
    "rslora": {"rslora": True},
    "another alpha": {"alpha_pattern": {"up_proj": 3.0}},
    "another rank": {"rank_pattern": {"down_proj": 2, "q_proj": 6}, "rslora": True},
    "dropout": {"dropout": 0.1},
}


def drawn(base: Path, **config: Any) -> Decoder:
    """Opens a base, with an adapter of a kind."""
    return tiny.moved(qlora.load(base, dtype="float32")[0], **config)


def differing(side: Any, model: Decoder, ids: Path, out: Path, **job: Any) -> float:
    """Returns by how much logits of transformers and PEFT differ from a model's."""
    side("logits", ids=ids, out=out / "theirs.npz", **job)
    theirs = np.load(out / "theirs.npz")["logits"]
    return float(np.abs(theirs - tiny.logits(model, np.load(ids))).max())


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in FAMILIES for kind in SAME]
    + [(name, "all-linear") for name in MORE],
)
def test_our_adapter_of_experts_opens_in_peft(side, bases, ids, tmp_path, name, kind):
    model = drawn(bases[name], **SAME[kind])
    adapter = qlora.export_peft(tmp_path / "a", model)
    job = {"base": bases[name], "adapter": adapter, "converted": True}
    assert differing(side, model, ids, tmp_path, **job) < ORDER


GRADIENTS = 2e-4
"""The error allowed, relative to the largest of a tensor's gradient, as of dense families."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]},
    "one, and linears": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj"],
        "rank_pattern": {"gate_up_proj": 2},
    },
    "of a layer": {
        "target_modules": ["o_proj"],
        "target_parameters": ["1.mlp.experts.down_proj"],
        "alpha_pattern": {"experts.down_proj": 3},
    },
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("name", (*FAMILIES, "gpt_oss"))
def test_pefts_adapters_of_whole_parameters_open(
    side, bases, ids, tmp_path, name, kind
):
    config = {"r": 4, "target_modules": []} | PARAMETERS[kind]
    side("adapter", base=bases[name], config=config, ids=ids, out=tmp_path / "theirs")
    model, _ = qlora.load(bases[name], dtype="float32")
    adapted = qlora.import_peft(tmp_path / "theirs", model)
    job = {"base": bases[name], "adapter": tmp_path / "theirs", "converted": True}
    assert differing(side, adapted, ids, tmp_path, **job) < ORDER
    moved = float(np.abs(tiny.logits(adapted, IDS) - tiny.logits(model, IDS)).max())
    assert moved > 30 * ORDER


FUSED: dict[str, dict[str, Any]] = SAME | {
    "gate_proj": {"targets": "gate_proj"},
    "gate and down": {"targets": "gate_proj,down_proj,k_proj"},
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("name", ("gpt_oss", "gemma4_text"))
def test_adapters_of_fused_files_are_such_of_parameters(
    side, bases, ids, tmp_path, name, kind
):
    model = drawn(bases[name], **FUSED[kind])
    adapter = qlora.export_peft(tmp_path / "a", model)
    job = {"base": bases[name], "adapter": adapter}
    assert differing(side, model, ids, tmp_path, **job) < ORDER
    back = qlora.import_peft(adapter, qlora.load(bases[name], dtype="float32")[0])
    np.testing.assert_allclose(
        tiny.logits(back, IDS), tiny.logits(model, IDS), atol=ORDER
    )


ATTENTION = "q_proj,k_proj,v_proj,o_proj,in_proj_qkvz,in_proj_qkv,out_proj"


@pytest.mark.parametrize("name", (*FAMILIES, *MORE, "gpt_oss", "gemma4_text"))
def test_a_steps_loss_and_gradients_are_those_of_peft(side, bases, ids, tmp_path, name):
    """Those of adapters beside the experts: they come through experts and router."""
    base, _ = qlora.load(bases[name], dtype="float32")
    have = {path[-1] for path, _ in modules(base, Linear)}
    targets = ",".join(name for name in ATTENTION.split(",") if name in have)
    model = tiny.adapted(base, rank=2, targets=targets)
    job = {"base": bases[name], "ids": ids, "out": tmp_path / "theirs.npz"}
    job["adapter"] = qlora.export_peft(tmp_path / "a", model)
    side("logits", **job, grads=True)
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    graphdef, lora, rest = qlora.split(model)
    loss, grads = tiny.adapter_step(graphdef, lora, rest, IDS)
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5)
    out = qlora.export_peft(tmp_path / "grads", qlora.join(graphdef, grads, rest))
    for key, got in load_file(out / "adapter_model.safetensors").items():
        want = theirs[f"grad:{key}"]
        atol = GRADIENTS * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_routers_is_that_of_transformers(side, bases, ids, tmp_path, name):
    base, _ = qlora.load(bases[name], dtype="float32")
    graphdef, lora, rest = qlora.split(tiny.adapted(base, rank=2, targets="q_proj"))
    model = qlora.join(graphdef, lora, rest)
    job = {"base": bases[name], "ids": ids, "out": tmp_path / "theirs.npz"}
    job["adapter"] = qlora.export_peft(tmp_path / "a", model)
    side("logits", **job, grads=True, router_aux_loss=0.5, padded=6)
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    weights = jnp.ones(IDS.shape, jnp.float32).at[1, 6:].set(0)
    step = qlora.make_train_step(graphdef, optax.sgd(1.0), router_aux_loss=0.5)
    batch = {"tokens": IDS, "weights": weights}
    copy, state = jax.tree.map(jnp.copy, lora), optax.sgd(1.0).init(lora)
    after, _, metrics = step(copy, rest, state, batch)
    for figure in ("loss", "router_aux_loss"):
        np.testing.assert_allclose(metrics[figure], theirs[figure], rtol=1e-5)
    grads = jax.tree.map(jnp.subtract, lora, after)
    out = qlora.export_peft(tmp_path / "grads", qlora.join(graphdef, grads, rest))
    for key, got in load_file(out / "adapter_model.safetensors").items():
        want = theirs[f"grad:{key}"]
        atol = GRADIENTS * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", (*FAMILIES, *MORE, "gpt_oss", "gemma4_text"))
def test_merged_experts_open_in_transformers(side, bases, ids, tmp_path, name):
    merged = qlora.merge(drawn(bases[name]), dtype="float32")
    qlora.save_model(merged, tmp_path / "m", source=bases[name], shard_bytes=200_000)
    assert differing(side, merged, ids, tmp_path, base=tmp_path / "m") < ORDER


def test_experts_in_mxfp4_are_what_transformers_decodes(side, bases, ids, tmp_path):
    base = family_folders.in_mxfp4(bases["gpt_oss"], tmp_path / "base")
    model, _ = qlora.load(base, dtype="float32")
    assert differing(side, model, ids, tmp_path, base=base) < ORDER
    qlora.save_model(model, tmp_path / "again", source=base)
    assert differing(side, model, ids, tmp_path, base=tmp_path / "again") < ORDER


@pytest.mark.parametrize("name", (*FAMILIES, "gpt_oss", "gemma4_text"))
def test_a_4_bit_folder_of_transformers_has_dense_experts_and_opens_in_ours(
    side, bases, ids, tmp_path, name
):
    folder = tmp_path / "theirs"
    quant = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    side("quantize", base=bases[name], quant=quant, out=folder)
    model, _ = qlora.load(folder, dtype="float32")
    for stack in model.stacks:
        assert isinstance(stack.attn.q_proj, QuantizedLinear)
        mixture = getattr(stack.mlp, "mixture", stack.mlp)
        assert not isinstance(mixture.experts.gate_proj, QuantizedLinear)
    assert differing(side, model, ids, tmp_path, base=folder) < ORDER


def test_4_bit_experts_of_ours_are_refused_by_transformers_5(
    side, bases, ids, tmp_path
):
    model, _ = qlora.load(bases["mixtral"], QuantConfig(), "float32")
    qlora.save_model(model, tmp_path / "ours", source=bases["mixtral"])
    job = {"base": tmp_path / "ours", "ids": ids, "out": tmp_path / "x"}
    assert "ignore_mismatched_sizes" in side.fails("logits", **job)
