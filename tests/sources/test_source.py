"""Folders as people have them: what is renamed, left out, used, and refused by name.

Each form here was opened by transformers 5.24 with the same logits as the plain folder:
tests/interop/test_odd_folders.py, where PyTorch is there.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters import LoRAConfig
from qlora_jax.adapters.attach import split
from qlora_jax.errors import CheckpointError
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import export_peft
from qlora_jax.models import Decoder, gemma3_text, wrappers
from qlora_jax.nn.rope import Rope
from qlora_jax.sources.load import load
from qlora_jax.sources.safetensors import INDEX, SINGLE
from qlora_jax.sources.save import save_model
from qlora_jax.sources.source import open_source

CONFIG = oracle.hf_config()
Tensors = dict[str, np.ndarray]


def tensors(**changes: Any) -> Tensors:
    return oracle.hf_tensors(CONFIG | changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The model of the folder without oddities."""
    folder = tmp_path_factory.mktemp("plain")
    return load(oracle.write_folder(folder, CONFIG, tensors()), dtype="float32")[0]


def same(a: Decoder, b: Decoder) -> None:
    for x, y in zip(tiny.frozen(a), tiny.frozen(b), strict=True):
        np.testing.assert_array_equal(x, y)


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """Returns the one warning that there is, '' for none."""
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) < 2, said
    caplog.clear()
    return "".join(said)


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LEFT = {
    "score": ({"score.weight": (2, 64)}, "score.weight (1 tensor)"),
    "value head": (
        {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
        "v_head.* (2 tensors)",
    ),
    "deeper": (
        {f"model.layers.2.mlp.{x}_proj.weight": (8, 8) for x in ("up", "down")}
        | {"model.layers.13.eh_proj.weight": (8, 8)},
        "layer 2 of 2 (2 tensors), layer 13 of 2 (1 tensor)",
    ),
    "biases": (
        {f"model.layers.{i}.self_attn.q_proj.bias": (64,) for i in range(2)},
        "model.layers.*.self_attn.q_proj.bias (2 tensors)",
    ),
    "packed": (
        {"mtp.fc.weight": (4, 4), "mtp.fc.weight.absmax": (1,)},
        "mtp.* (2 tensors)",
    ),
    "frequencies": ({"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}, None),
}


@pytest.mark.parametrize("case", LEFT)
def test_tensors_without_a_place_are_left_out_and_named(plain, tmp_path, caplog, case):
    shapes, said = LEFT[case]
    more = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    folder = oracle.write_folder(tmp_path, CONFIG, tensors() | more)
    same(load(folder, dtype="float32")[0], plain)
    assert (said or "") in (text := warned(caplog))
    assert (text == "") == (said is None)


@pytest.mark.parametrize("twice", [False, True])
def test_names_lack_model_or_have_it_twice(plain, tmp_path, caplog, twice):
    odd = {
        f"model.{k}" if twice else k.removeprefix("model."): v
        for k, v in tensors().items()
    }
    same(load(oracle.write_folder(tmp_path, CONFIG, odd), dtype="float32")[0], plain)
    assert not warned(caplog)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    odd = tensors() | {"norm.weight": np.ones(64, np.float32)}
    oracle.write_folder(tmp_path, CONFIG, odd)
    with pytest.raises(CheckpointError, match=r"norm\.weight are both model\.norm"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_of_a_wrapped_module_are_missing_and_say_so(tmp_path, prefix):
    odd = {prefix + name: value for name, value in tensors().items()}
    oracle.write_folder(tmp_path, CONFIG, odd)
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load(tmp_path)
    assert f"do not begin with {prefix!r}" in str(caught.value)


def test_a_plain_config_over_the_names_of_a_multimodal_model_is_refused(tmp_path):
    odd = {f"language_model.{name}": value for name, value in tensors().items()}
    oracle.write_folder(tmp_path, CONFIG, odd)
    with pytest.raises(CheckpointError, match="do not begin with 'language_model.'"):
        load(tmp_path)


def test_an_untied_head_that_is_missing_asks_whether_it_is_tied(tmp_path):
    oracle.write_folder(tmp_path, CONFIG, tensors(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match='write "tie_word_embeddings": true'):
        load(tmp_path)


def test_a_head_that_differs_is_used_though_config_says_tied(plain, tmp_path, caplog):
    # transformers 5.24, modeling_utils.py, tie_weights: both present and different.
    hf = CONFIG | {"tie_word_embeddings": True}
    oracle.write_folder(tmp_path / "own", hf, tensors())
    model, _ = load(tmp_path / "own", dtype="float32")
    same(model, plain)
    assert "lm_head.weight differs from the embedding" in warned(caplog)
    assert not open_source(tmp_path / "own").hf["tie_word_embeddings"]
    save_model(model, tmp_path / "saved", source=tmp_path / "own")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["tie_word_embeddings"] is False


@pytest.mark.parametrize("present", ["both", "head"])
def test_a_head_that_is_the_embedding_stays_tied(tmp_path, caplog, present):
    hf = CONFIG | {"tie_word_embeddings": True}
    odd = oracle.hf_tensors(hf)
    odd["lm_head.weight"] = odd["model.embed_tokens.weight"].copy()
    if present == "head":
        del odd["model.embed_tokens.weight"]
    model, _ = load(oracle.write_folder(tmp_path, hf, odd), dtype="float32")
    assert model.lm_head is None and model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.embed_tokens.weight[...], odd["lm_head.weight"])
    assert not warned(caplog)


def test_a_whole_file_goes_before_an_index(plain, tmp_path, caplog):
    oracle.write_folder(tmp_path, CONFIG, tensors())
    index(tmp_path, dict.fromkeys(tensors(), "model-00001-of-00002.safetensors"))
    same(load(tmp_path, dtype="float32")[0], plain)
    assert f"{INDEX} is there beside {SINGLE}" in warned(caplog)


def test_a_tensor_in_two_shards_is_read_from_the_latter(plain, tmp_path, caplog):
    oracle.write_folder(tmp_path, CONFIG, {})
    (tmp_path / SINGLE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"model.norm.weight": np.zeros(64, np.float32)}, tmp_path / names[0])
    save_file(tensors(), tmp_path / names[1])
    index(tmp_path, {"a": names[0], "b": names[1]})
    same(load(tmp_path, dtype="float32")[0], plain)
    assert "model.norm.weight (model-00001-of-00002" in warned(caplog)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metadata": {"total_size": 1}}', "expected an object with a weight_map"),
        ("{}", "expected an object with a weight_map"),
        ("[]", "holds list, expected an object"),
        ("x", "is not JSON"),
    ],
)
def test_an_index_without_a_map_is_refused(tmp_path, text, message):
    oracle.write_folder(tmp_path, CONFIG, {})
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_shards_that_are_missing_are_all_named(tmp_path):
    oracle.write_folder(tmp_path, CONFIG, {})
    (tmp_path / SINGLE).unlink()
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load(tmp_path)
    assert "model-00001-of-00002" in str(caught.value) and "two" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.safetensors", "name a single file model.safetensors"),
        ("README.md", "expected a Hugging Face model folder"),
    ],
)
def test_a_folder_without_our_weights_says_what_it_has(tmp_path, file, said):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"has no {SINGLE}.*{said}"):
        load(tmp_path)


def test_an_adapter_in_place_of_a_model_is_told_apart(tmp_path):
    model = tiny.adapted(tiny.decoder(), targets="q_proj")
    export_peft(tmp_path / "peft", model)
    config = LoRAConfig(rank=4, alpha=8.0, targets="q_proj")
    save_adapter(tmp_path / "run" / "adapter", split(model)[1], config)
    for folder, said in (
        ("peft", "it is a PEFT adapter. Give it as --adapter"),
        ("run", "a run's or an adapter's folder"),
        ("run/adapter", "a run's or an adapter's folder"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / folder)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF files; give one of them: a-q4"):
        load(tmp_path / "files")


def test_an_adapter_beside_a_model_is_said_not_to_be_applied(tmp_path, caplog):
    oracle.write_folder(tmp_path, CONFIG, tensors())
    (tmp_path / "adapter_config.json").write_text("{}")
    load(tmp_path, dtype="float32")
    assert "its adapter is not applied" in warned(caplog)


OLD = "language_model."
FORMS = {
    "old": lambda name: OLD + name,
    "new": lambda name: (
        name
        if name == "lm_head.weight"
        else name.replace("model.", "model.language_model.")
    ),
}


def wrapped(out: Path, form: str, text: dict[str, Any], stored: Tensors) -> Path:
    """Writes a LLaVA whose text model is given, with tensors of its vision."""
    odd = {FORMS[form](name): value for name, value in stored.items()}
    odd["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    odd["multi_modal_projector.linear_1.bias"] = np.ones(8, np.float32)
    outer = {"model_type": "llava", "text_config": text, "eos_token_id": [2, 5]}
    return oracle.write_folder(out, outer, odd)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_model_is_opened_out_of_its_wrapper(plain, tmp_path, caplog, form):
    folder = wrapped(tmp_path / "llava", form, CONFIG, tensors())
    tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
    model, tokenizer = load(folder, dtype="float32")
    same(model, plain)
    assert model.config == plain.config
    assert tokenizer is not None and tokenizer.eos_ids == (2, 5)
    text = warned(caplog)
    assert "it is a llava: its text model is opened alone, as llama" in text
    assert "multi_modal_projector.* (1 tensor), vision_tower.* (1 tensor)" in text
    save_model(model, tmp_path / "text", source=folder)
    saved = json.loads((tmp_path / "text/config.json").read_text())
    assert (saved["model_type"], saved["eos_token_id"]) == ("llama", [2, 5])
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert "text_config" not in saved and "vision_config" not in saved
    same(load(tmp_path / "text", dtype="float32")[0], plain)
    assert not warned(caplog)


def test_4_bit_tensors_are_found_in_a_wrapper(golden, tmp_path, caplog):
    packed = golden("models/llama_bnb_nf4_dq_float32")
    stored = json.loads((packed / "config.json").read_text())
    quantization = stored.pop("quantization_config")
    skip = ["lm_head", "vision_tower", "language_model.model.layers.0.mlp.up_proj"]
    quantization["llm_int8_skip_modules"] = skip
    tensors = load_file(packed / SINGLE)
    folder = wrapped(tmp_path / "w", "old", stored, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    same(load(folder, dtype="float32")[0], load(packed, dtype="float32")[0])
    assert "vision_tower.* (1 tensor)" in warned(caplog)
    assert open_source(folder).hf["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
    ]


def test_gemma_3_4b_has_what_its_config_leaves_out():
    # config.json of google/gemma-3-4b-it; the rest is transformers 5.24's Gemma3TextConfig.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    hf = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    made, problems = wrappers.unwrap(hf)
    assert not problems and made["eos_token_id"] == [1, 106]
    config, problems = gemma3_text.read_config(made)
    assert config is not None and not problems
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262208, 8, 4)
    assert (config.head_dim, config.attention_scale) == (256, 256**-0.5)
    assert config.rope_theta == 1e6
    assert config.specs[0].mixer.rope == Rope(theta=1e4, dim=256)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8
    assert config.tie_word_embeddings and config.max_position_embeddings == 131072
    windows = [spec.mixer.window for spec in config.specs]
    assert windows[:6] == [1024] * 5 + [None] and len(windows) == 34


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        ({"model_type": "paligemma"}, "'paligemma'; known architectures.*gemma3"),
        (
            {"model_type": "llava", "text_config": {"model_type": "opt"}},
            "text_config of this llava has model_type 'opt'; known",
        ),
        ({"model_type": "gemma3", "text_config": 3}, "text_config is 3"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral4"}},
            r"has model_type 'mistral4'; known(.|\n)*nearest is deepseek_v3, which lacks",
        ),
    ],
)
def test_a_wrapper_that_is_not_known_is_refused_by_name(tmp_path, hf, said):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)


def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path):
    oracle.write_folder(tmp_path, CONFIG | {"num_hidden_layers": 900}, {})
    with pytest.raises(CheckpointError, match="num_hidden_layers 900, and it has"):
        _ = open_source(tmp_path).tensors
