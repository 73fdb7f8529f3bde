"""Folders as people have them, live: what transformers opens gives the same logits here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.models import FAMILIES, wrappers
from qlora_jax.sources.source import open_source

pytestmark = pytest.mark.interop

ORDER = 3e-5
"""Absolute, of logits of size 10: float32 sums in another order."""
ORDER_OF_RULE = 1e-4
"""The absolute error allowed of a model with the gated delta rule: its sums may nearly cancel,
and a norm divides what is left by its size."""
WRAPPED = "AutoModelForImageTextToText"
LLAMA = oracle.hf_config(vocab_size=272)
Tensors = dict[str, np.ndarray]


def same_logits(
    side: Any, folder: Path, ids: Path, model: Any = None, **job: Any
) -> None:
    """Compares a folder in transformers with the same folder, or a model, in ours."""
    if model is None:
        model, _ = qlora.load(folder, dtype="float32")
    out = folder / "logits.npz"
    side("logits", base=folder, ids=ids, out=out, **job)
    ours = tiny.logits(model, np.load(ids))
    recurrent = model.config.model_type.startswith("qwen3_5")
    atol = ORDER_OF_RULE if recurrent else ORDER
    np.testing.assert_allclose(ours, np.load(out)["logits"], atol=atol, rtol=0)
    assert np.abs(ours).max() > 1


def extra(**more: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(7)
    return lambda t: (
        t
        | {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in more.items()
        }
    )


def renamed(rename: Any) -> Any:
    return lambda t: {rename(name): value for name, value in t.items()}


def deeper(t: Tensors) -> Tensors:
    return oracle.hf_tensors(LLAMA | {"num_hidden_layers": 3}) | t


NAMES = {
    "a score": extra(**{"score.weight": (2, 64)}),
    "a value head": extra(**{"v_head.summary.weight": (1, 64)}),
    "a bias": extra(**{"model.layers.1.self_attn.q_proj.bias": (64,)}),
    "a third layer": deeper,
    "no model.": renamed(lambda name: name.removeprefix("model.")),
    "model. twice": renamed(lambda name: f"model.{name}"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_and_extra_tensors(side, ids, tmp_path, case):
    tensors = NAMES[case](oracle.hf_tensors(LLAMA))
    oracle.write_folder(tmp_path, LLAMA, tensors)
    same_logits(side, tmp_path, ids, loose=True)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", ["equal", "different", "head alone"])
def test_a_tied_config_with_a_head_in_the_file(side, ids, tmp_path, case, family):
    config = oracle.hf_config(model_type=family, vocab_size=272)
    config |= {"tie_word_embeddings": True}
    tensors = oracle.hf_tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + (case == "different")
    if case == "head alone":
        del tensors["model.embed_tokens.weight"]
    oracle.write_folder(tmp_path, config, tensors)
    same_logits(side, tmp_path, ids)


def test_a_stale_index_is_not_used(side, ids, tmp_path):
    oracle.write_folder(tmp_path, LLAMA, oracle.hf_tensors(LLAMA))
    other = oracle.hf_tensors(LLAMA, seed=1)
    save_file(other, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same_logits(side, tmp_path, ids)


def test_a_tensor_that_two_shards_have(side, ids, tmp_path):
    oracle.write_folder(tmp_path, LLAMA, {})
    (tmp_path / "model.safetensors").unlink()
    shards = {}
    for i in (1, 2):
        shard = f"model-0000{i}-of-00002.safetensors"
        tensors = oracle.hf_tensors(LLAMA, seed=i)
        save_file(tensors, tmp_path / shard, {"format": "pt"})
        shards |= dict.fromkeys(sorted(tensors)[i::2], shard)
    index = {"metadata": {}, "weight_map": shards}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same_logits(side, tmp_path, ids)


LINEAR = {"rope_type": "linear", "factor": 2.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "torch_dtype": {"torch_dtype": "float16"},
    "no architectures": {"architectures": None},
    "kv heads null": {"num_key_value_heads": None},
    "head_dim null": {"head_dim": None},
    "head_dim wide": {"head_dim": 32},
    "theta": {"rope_theta": 500.0},
    "rope_parameters": {"rope_parameters": {"rope_theta": 500.0}},
    "theta beside rope_parameters": {
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default"},
    },
    "two thetas": {"rope_theta": 70.0, "rope_parameters": {"rope_theta": 500.0}},
    "rope_scaling": {"rope_theta": 500.0, "rope_scaling": LINEAR},
    "rope_scaling of old": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_scaling null": {"rope_theta": 500.0, "rope_scaling": None},
    "both": {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 500.0}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_spellings_of_a_config(side, ids, tmp_path, case):
    config = {k: v for k, v in (LLAMA | CONFIGS[case]).items()}
    if config["architectures"] is None:
        del config["architectures"]
    heads = config["num_key_value_heads"] or config["num_attention_heads"]
    tensors = oracle.hf_tensors(config | {"num_key_value_heads": heads})
    oracle.write_folder(tmp_path, config, tensors)
    same_logits(side, tmp_path, ids)


TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
VISION = SMALL | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model"} | VISION
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32} | VISION
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
LOCAL = {
    "head_dim": 16,
    "sliding_window": 6,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 20,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | LOCAL | {"model_type": "gemma3_text"},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 6,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": TEXT["vocab_size"],
            "final_logit_softcapping": 30.0,
        },
        "vision_config": SMALL
        | {
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
            **{"patch_size": 4, "position_embedding_size": 16},
        },
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP,
    },
    "llava_next": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": 6},
        "vision_config": CLIP,
    },
    "llava_onevision": {
        "text_config": TEXT | {"model_type": "qwen2", "tie_word_embeddings": True},
        "vision_config": SIGLIP,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen3", "head_dim": 16},
        "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        "tie_word_embeddings": False,
    },
    "mistral3": {
        "text_config": TEXT
        | {
            "model_type": "ministral3",
            "head_dim": 32,
            "rope_parameters": {
                "type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "vision_config": {"model_type": "pixtral"} | VISION,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_scaling": MROPE},
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
        },
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_scaling": MROPE, "tie_word_embeddings": True},
        "vision_config": QWEN_VISION | {"out_hidden_size": 64},
    },
    "qwen3_vl": {
        "text_config": TEXT
        | {
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": QWEN_VISION
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            "head_dim": 32,
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": QWEN_VISION | {"out_hidden_size": 64},
    },
}
_MIXED = WRAPPERS["qwen3_5"]
WRAPPERS["qwen3_5_moe"] = _MIXED | {
    "text_config": _MIXED["text_config"]
    | {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "shared_expert_intermediate_size": 32,
    },
}


def test_every_wrapper_that_opens_is_compared():
    assert {*WRAPPERS} == {*wrappers.WRAPPERS}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_model_of_a_multimodal_folder(side, ids, tmp_path, caplog, kind):
    base, ours = tmp_path / "base", tmp_path / "ours"
    side("make", config={"model_type": kind} | WRAPPERS[kind], auto=WRAPPED, out=base)
    model, _ = qlora.load(base, dtype="float32")
    assert f"it is a {kind}" in caplog.text and "vis" in caplog.text
    same_logits(side, base, ids, model, auto=WRAPPED)
    qlora.save_model(model, ours, source=base)
    same_logits(side, ours, ids, model)  # by a class for text alone, and cleanly
    if kind not in ("gemma3", "qwen2_5_vl"):
        return
    packed, _ = qlora.load(base, qlora.QuantConfig(), "float32")
    qlora.save_model(packed, ours, source=base, overwrite=True)
    same_logits(side, ours, ids, packed)


@pytest.mark.parametrize(
    "kind", ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
)
def test_every_form_of_its_names(side, ids, tmp_path, kind):
    side(
        "make", config={"model_type": kind} | WRAPPERS[kind], auto=WRAPPED, out=tmp_path
    )
    stored = load_file(tmp_path / "model.safetensors")
    model, _ = qlora.load(tmp_path, dtype="float32")

    def plain(name: str) -> str:
        return name.replace("language_model.", "").removeprefix("model.")

    forms = [
        lambda name: (
            name if name == "lm_head.weight" else f"model.language_model.{name}"
        ),
        lambda name: (
            f"language_model.{name}"
            if name == "lm_head.weight"
            else f"language_model.model.{name}"
        ),
    ]
    if kind.startswith("qwen"):
        forms[1:] = [lambda name: name if name == "lm_head.weight" else f"model.{name}"]
    for form in forms[: 1 if kind.startswith("qwen3") else 2]:
        text = {
            name: form(plain(name))
            for name in stored
            if "layers." in plain(name)[:7]
            or plain(name) in ("embed_tokens.weight", "norm.weight", "lm_head.weight")
        }
        tensors = {text.get(name, name): value for name, value in stored.items()}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        again, _ = qlora.load(tmp_path, dtype="float32")
        for a, b in zip(tiny.frozen(again), tiny.frozen(model), strict=True):
            np.testing.assert_array_equal(a, b)
        same_logits(side, tmp_path, ids, model, auto=WRAPPED)


HUB: dict[str, dict[str, Any]] = {  # as folders of the hub have it; vision left out
    "gemma-3-4b": {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "llava-1.5-7b": {
        "model_type": "llava",
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
    },
    "qwen2.5-vl-3b, flat": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    **{
        kind: {"model_type": kind, "text_config": {"num_hidden_layers": 5}}
        for kind in WRAPPERS
    },
}


@pytest.mark.parametrize("case", HUB)
def test_what_a_wrapper_leaves_out_is_as_transformers_has_it(side, tmp_path, case):
    (tmp_path / "config.json").write_text(json.dumps(HUB[case]))
    theirs = side("settings", base=tmp_path)
    source = open_source(tmp_path)
    hf, family, config = source.hf, source.family, source.config
    theirs["model_type"] = family.MODEL_TYPE
    wanted, problems = FAMILIES[family.MODEL_TYPE].read_config(theirs)
    assert (config, problems) == (wanted, [])
    assert hf["tie_word_embeddings"] == theirs["tie_word_embeddings"]
