"""GGUF files: read by Hugging Face names, written for llama.cpp, and what is refused.

What is written was also run by llama.cpp itself (of October 2026): tiny float32 models
of every architecture here give our logits, and the tokenizers our ids.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import tokenizers
from flax import nnx
from models import family_cases as cases
from safetensors.numpy import save_file
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qlora_jax.errors import CheckpointError, OutputExistsError, ShapeError
from qlora_jax.models import FAMILIES, Decoder, hf_table
from qlora_jax.names import dotted
from qlora_jax.nn import quantize
from qlora_jax.nn.rope import RopeScaling
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf.file import GGUF, open_gguf
from qlora_jax.sources.gguf.places import names_of
from qlora_jax.sources.gguf.tokenizer import PROBE
from qlora_jax.sources.gguf.write import write_gguf
from qlora_jax.sources.load import load
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.save import save_model
from qlora_jax.sources.source import open_source
from qlora_jax.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

VOCAB = 320
NORM_ATOL = 2e-7
"""A norm near 0 loses what float32 cannot keep of it beside the 1 that Gemma adds, and a decay
what its exponential rounds."""
ROTATES = (pytest.mark.slow, pytest.mark.rotates)
ALWAYS = ("llama_llama3", "gemma2", "phi3", "qwen3_moe", "gpt_oss", "deepseek_v2")
"""What `scripts/test` writes and reads: a case of each way that files differ from folders."""

WRITTEN: dict[str, dict[str, Any]] = {
    "llama_llama3": {},
    "llama_linear": {},
    "mistral_full": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
    },
    "phi3": {},
    "phi3_longrope_partial": {},
    "arcee": {},
    "cohere": {"attention_bias": False},
    "cohere2": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": None},
    "glm4": {"attention_bias": True},
    "hunyuan_v1_dense": {},
    "olmo2": {},
    "olmo3": {
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 500.0},
            "full_attention": cases.YARN
            | {"rope_theta": 500.0, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    },
    "seed_oss": {"attention_out_bias": False},
    "granite": {},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"use_sliding_window": False, "mlp_only_layers": []},
    "qwen3_moe": {},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {
        "swiglu_limit": 7.0,
        "rope_scaling": cases.YARN
        | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "minimax_m2": {},
    "deepseek_v2": {
        **{"q_lora_rank": 24, "topk_method": "greedy", "n_group": 1},
        **{"topk_group": 1, "rms_norm_eps": 1e-6},
    },
    "deepseek_v3": {
        **{"attention_bias": False, "rms_norm_eps": 1e-6},
        "rope_scaling": cases.YARN
        | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 0.8},
    },
    "glm4_moe_lite": {
        **{"mlp_layer_types": ["dense", "sparse", "sparse"], "rms_norm_eps": 1e-6}
    },
    "qwen3_5_text": {"linear_value_head_dim": 16},
    "qwen3_5_moe_text": {"linear_value_head_dim": 16, "linear_num_value_heads": 4},
    "qwen3_next": {"linear_value_head_dim": 16},
    "granitemoehybrid": {},
    "granitemoehybrid_dense": {"mamba_conv_bias": True, "mamba_proj_bias": False},
    "lfm2": {"conv_bias": False},
    "lfm2_moe": {"routed_scaling_factor": 1.0, "tie_embedding": True},
}
"""Cases that a GGUF file can hold -> what must be otherwise for it."""
TEXT = "the quick brown fox, then the other one: 12 of 345, isn't it? " * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    **{
        name: [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name, words in {
            "qwen2": LLAMA3.replace("{1,3}", ""),
            "deepseek-r1-qwen": LLAMA3.replace("{1,3}", ""),
            "llama-bpe": LLAMA3,
            "dbrx": LLAMA3,
        }.items()
    },
}
"""tokenizer.ggml.pre -> how Hugging Face's tokenizer.json says it."""


def byte_level(pre: str = "gpt-2") -> tokenizers.Tokenizer:
    """Returns a small byte-level tokenizer with merges and three added tokens."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence(PRE[pre])
    made.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<tool>"])
    return made


def sentencepiece(prefix: bool = True) -> tokenizers.Tokenizer:
    """Returns a small SentencePiece tokenizer in tokenizer.json's form."""
    pieces = [
        "_t",
        "he",
        "_the",
        "in",
        "qu",
        "_a",
        "an",
        "_an",
        "er",
        "he_",
        "__",
        "_b",
    ]
    pieces = [piece.replace("_", "▁") for piece in pieces]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    known += [chr(ord("a") + i) for i in range(22)] + pieces
    vocab = {piece: i for i, piece in enumerate(known)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in reversed(range(1, len(piece)))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    model = models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    prepend = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([*steps, *strip])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def write_tokenizer(folder: Path, made: tokenizers.Tokenizer, **settings: Any) -> Path:
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": tiny.CHAT_TEMPLATE,
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_case(folder: Path, case: str, **changes: Any) -> Path:
    """Writes a tiny model of a family with a tokenizer."""
    config = cases.CASES[case] | {"vocab_size": VOCAB, "pad_token_id": None}
    config |= WRITTEN.get(case, {}) | changes
    family = FAMILIES[config["model_type"]]
    decoder, problems = family.read_config(config)
    assert decoder is not None, problems
    skeleton = nnx.eval_shape(lambda: Decoder(decoder, key=jax.random.key(0)))
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(skeleton)):
        name, table = dotted(path), hf_table(decoder)
        shape = variable.get_value().shape[len(table.stack(name)) :]
        tensors |= {n: cases.weight(case, n, shape) for n in table.names(name)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return write_tokenizer(folder, byte_level())


def written(folder: Path, dtype: str = "f32") -> GGUF:
    write_gguf(folder, folder / "model.gguf", dtype)
    return open_gguf(folder / "model.gguf")


def decoder_of(config: dict[str, Any]) -> Any:
    return FAMILIES[config["model_type"]].read_config(config)[0]


def same_settings(a: Any, b: Any) -> None:
    """Asserts that two decoders' configs are the same, as far as float32 can tell."""
    for field in dataclasses.fields(a):
        key, value, other = field.name, getattr(a, field.name), getattr(b, field.name)
        if not field.compare:
            continue
        if isinstance(value, RopeScaling):
            same_settings(value, other)
        else:
            wanted = pytest.approx(other) if isinstance(other, float) else other
            assert value == wanted, key


def raw(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns metadata and tensors as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    return meta, {tensor.name: tensor for tensor in reader.tensors}


LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
"""What a file of a Llama must say; the defaults of the rest are llama.cpp's."""


def write_raw(
    path: Path,
    meta: dict[str, Any],
    tensors: dict[str, np.ndarray | tuple[np.ndarray, Any]] | None = None,
) -> Path:
    """Writes a file with the package gguf: metadata, and arrays or (bytes, type)."""
    writer = gguf.GGUFWriter(path, meta.get("general.architecture", "none"))
    add = {int: "add_uint32", float: "add_float32", str: "add_string", bool: "add_bool"}
    for key, value in meta.items():
        if key != "general.architecture":
            getattr(writer, add.get(type(value), "add_array"))(key, value)
    for name, value in (tensors or {}).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(path: Path, meta: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """Writes a file with LLAMA's metadata, changed, and an embedding."""
    embedding = {"token_embd.weight": np.ones((VOCAB, 32), np.float32)}
    made = {key: v for key, v in (LLAMA | (meta or {})).items() if v is not None}
    return write_raw(path, made, embedding | tensors)


# --- a folder, written and read


def test_a_window_that_llama_cpp_leaves_out_is_said(tmp_path, caplog):
    written(write_case(tmp_path, "phi3"))
    assert "the window of 10 tokens of a phi3" in caplog.text


def test_what_llama_cpp_would_compute_otherwise_of_latent_attention_is_said(
    tmp_path, caplog
):
    folder = write_case(tmp_path / "a", "deepseek_v3", rms_norm_eps=1e-5)
    written(folder)
    assert "takes rms_norm_eps, which is 1e-05, for the norms" in caplog.text
    folder = write_case(tmp_path / "b", "deepseek_v2", q_lora_rank=None)
    with pytest.raises(CheckpointError, match="q_lora_rank is None, of 3 layers"):
        written(folder)
    groups = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    folder = write_case(tmp_path / "c", "deepseek_v2", **groups)
    with pytest.raises(CheckpointError, match="n_group is 4; llama.cpp ranks groups"):
        written(folder)


@pytest.mark.parametrize(
    "case",
    [case if case in ALWAYS else pytest.param(case, marks=ROTATES) for case in WRITTEN],
)
def test_a_written_folder_is_read_as_it_was(tmp_path, case):
    folder = write_case(tmp_path, case)
    made, stored = written(folder), Checkpoint(folder)
    assert set(made) == set(stored) and len(made) == len(stored)
    rounds = case.startswith(("gemma", "qwen3_5", "qwen3_next", "granitemoe"))
    for name in stored:
        assert made.infos[name].shape == stored[name].shape == made[name].shape
        assert made.infos[name].dtype == made[name].dtype == np.float32
        ends = ("norm.weight", "A_log")
        atol = NORM_ATOL if rounds and name.endswith(ends) else 0
        np.testing.assert_allclose(made[name], stored[name], rtol=0, atol=atol)
    source = json.loads((folder / "config.json").read_text())
    same = (source["model_type"], "llama", "deepseek_v3")
    assert made.config["model_type"] in same
    same_settings(decoder_of(made.config), decoder_of(source))
    assert made.config["bos_token_id"] == byte_level().token_to_id("<s>")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)]
)
def test_matrices_are_rounded_and_vectors_kept(tmp_path, dtype, stored):
    folder = write_case(tmp_path, "qwen2")
    made, checkpoint = written(folder, dtype), Checkpoint(folder)
    for name, w in checkpoint.items():
        wanted = w if w.ndim == 1 else w.astype(stored)
        assert made[name].dtype == wanted.dtype
        np.testing.assert_array_equal(made[name], wanted)


def test_q8_0_is_within_half_a_step_of_its_block(tmp_path):
    folder = write_case(tmp_path, "llama_linear")  # intermediate_size 48
    made, checkpoint = written(folder, "q8_0"), Checkpoint(folder)
    down = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(made[down], checkpoint[down].astype(np.float16))
    _, tensors = raw(folder / "model.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    for name, w in checkpoint.items():
        if w.ndim == 2 and name != down and "down_proj" not in name:
            blocks = np.reshape(w, (-1, 32))
            steps = np.abs(blocks).max(axis=1, keepdims=True) / 127
            # The step is stored as float16, so the largest code is off by 2**-11 of it.
            error = np.abs(made[name].reshape(-1, 32) - blocks)
            assert (error <= steps * (0.5 + 127 * 2.0**-11)).all()


def test_a_file_says_what_llama_cpp_reads(tmp_path):
    folder = write_case(tmp_path / "A-model", "llama_llama3")
    write_gguf(folder, tmp_path / "a.gguf", "q8_0")
    meta, tensors = raw(tmp_path / "a.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "A-model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 500.0,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }
    assert {key: meta[key] for key in wanted} == wanted
    tokens, types = (meta[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    made = byte_level()
    ids = [made.token_to_id(token) for token in ("<s>", "</s>", "<tool>")]
    assert [types[i] for i in ids] == [3, 3, 4]
    assert meta["tokenizer.ggml.bos_token_id"] == ids[0]
    assert meta["tokenizer.ggml.eos_token_id"] == ids[1]
    size = made.get_vocab_size()
    assert (tokens[size], types[size], len(tokens)) == (f"[PAD{size}]", 5, VOCAB)
    merges = json.loads(made.to_str())["model"]["merges"]
    assert meta["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert tensors["rope_freqs.weight"].data.shape == (12,)
    assert tensors["rope_freqs.weight"].data.max() == 8
    assert "output.weight" in tensors


def test_rows_of_llamas_q_and_k_are_interleaved(tmp_path):
    folder = write_case(tmp_path, "llama_linear")
    written(folder)
    _, tensors = raw(folder / "model.gguf")
    checkpoint = Checkpoint(folder)
    for part, kind in (("q", "weight"), ("k", "weight"), ("q", "bias")):
        ours = checkpoint[f"model.layers.1.self_attn.{part}_proj.{kind}"]
        theirs = tensors[f"blk.1.attn_{part}.{kind}"].data
        # Heads of 8: features 0 and 4 rotate together, and are neighbours in the file.
        order = [8 + i for i in (0, 4, 1, 5, 2, 6, 3, 7)]
        np.testing.assert_array_equal(theirs[8:16], ours[order])
    assert "output.weight" not in tensors  # tied


def test_experts_are_one_tensor_a_linear(tmp_path):
    folder = write_case(tmp_path, "qwen2_moe")
    made = written(folder, "f16")
    _, tensors = raw(folder / "model.gguf")
    whole, checkpoint = tensors["blk.2.ffn_down_exps.weight"].data, Checkpoint(folder)
    names = [f"model.layers.2.mlp.experts.{i}.down_proj.weight" for i in range(4)]
    each = [checkpoint[name].astype(np.float16) for name in names]
    np.testing.assert_array_equal(whole, np.stack(each))
    assert made.stored(names[3]) == ("f16", each[3].nbytes)
    for router in ("ffn_gate_inp", "ffn_gate_inp_shexp"):
        assert tensors[f"blk.2.{router}.weight"].tensor_type.name == "F32"
    assert tensors["blk.2.ffn_gate_inp_shexp.weight"].data.shape == (32,)


def test_value_heads_that_share_a_key_head_are_apart(tmp_path):
    folder = write_case(tmp_path, "qwen3_5_text")
    written(folder)
    _, tensors = raw(folder / "model.gguf")
    ours = Checkpoint(folder)["model.layers.0.linear_attn.dt_bias"]
    np.testing.assert_array_equal(tensors["blk.0.ssm_dt.bias"].data, ours[[0, 2, 1, 3]])


def test_vectors_of_mamba_layers_have_two_axes(tmp_path):
    folder = write_case(tmp_path, "granitemoehybrid")
    written(folder, "f16")
    _, tensors = raw(folder / "model.gguf")
    shapes = {"ssm_a": (8, 1), "ssm_d": (8, 1), "ssm_norm.weight": (2, 32)}
    for name, shape in shapes.items():
        one = tensors[f"blk.0.{name}"]
        assert one.tensor_type.name == "F32" and one.data.shape == shape
    decay = Checkpoint(folder)["model.layers.0.mamba.A_log"]
    np.testing.assert_array_equal(tensors["blk.0.ssm_a"].data[:, 0], -np.exp(decay))


@pytest.mark.parametrize(
    ("case", "changes", "arch"),
    [
        (
            "granitemoehybrid",
            {"position_embedding_type": "rope", "shared_intermediate_size": 0},
            "granitemoe",
        ),
        ("granitemoehybrid_dense", {"position_embedding_type": "nope"}, "granite"),
        ("granitemoehybrid_dense", {"attention_bias": True}, "granite"),
    ],
)
def test_a_granite_4_without_mamba_is_of_another_architecture(
    tmp_path, case, changes, arch
):
    count = cases.CASES[case]["num_hidden_layers"]
    folder = write_case(tmp_path, case, layer_types=["attention"] * count, **changes)
    made, stored = written(folder), Checkpoint(folder)
    assert raw(folder / "model.gguf")[0]["general.architecture"] == arch
    assert set(made) == set(stored)
    for name in stored:
        np.testing.assert_array_equal(made[name], stored[name])
    source = json.loads((folder / "config.json").read_text())
    same_settings(decoder_of(made.config), decoder_of(source))


def again(
    path: Path, change: Callable[[dict[str, np.ndarray]], Any], **more: Any
) -> Path:
    """Writes a file again with its tensors changed in place, and more metadata."""
    meta, tensors = raw(path)
    meta = {k: v for k, v in meta.items() if not k.startswith("GGUF.")}
    meta |= {f"{meta['general.architecture']}.{key}": v for key, v in more.items()}
    arrays = {name: tensor.data for name, tensor in tensors.items()}
    change(arrays)
    return write_raw(path.with_name("again.gguf"), meta, arrays)


def fuse(arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name in arrays if name.endswith("gate_exps.weight")]:
        pair = arrays.pop(name), arrays.pop(name.replace("gate", "up"))
        arrays[name.replace("gate", "gate_up")] = np.concatenate(pair, axis=1)


@pytest.mark.parametrize(
    "case",
    [
        "qwen3_5_moe_text",
        *(pytest.param(case, marks=ROTATES) for case in ("qwen3_next", "deepseek_v3")),
    ],
)
def test_gate_and_up_of_experts_may_be_one_tensor(tmp_path, case):
    folder = write_case(tmp_path, case)
    apart = written(folder, "f16")
    whole = open_gguf(again(folder / "model.gguf", fuse))
    assert set(whole) == set(apart) and whole.config == apart.config
    (up,) = [name for name in apart if name.endswith("1.mlp.experts.3.up_proj.weight")]
    assert whole.stored(up) == apart.stored(up)
    assert whole.infos[up].shape == apart[up].shape
    for name in apart:
        np.testing.assert_array_equal(whole[name], apart[name])


def test_gate_and_up_in_one_tensor_are_read_where_llama_cpp_does(tmp_path):
    folder = write_case(tmp_path, "qwen3_moe")
    written(folder)
    made = open_gguf(again(folder / "model.gguf", fuse))
    assert "blk.0.ffn_gate_up_exps.weight" in made
    assert "model.layers.0.mlp.experts.0.up_proj.weight" not in made

    def odd(arrays: dict[str, np.ndarray]) -> None:
        fuse(arrays)
        arrays[whole] = np.ascontiguousarray(arrays[whole][:, 1:])

    def both(arrays: dict[str, np.ndarray]) -> None:
        kept = dict(arrays)
        fuse(arrays)
        arrays |= kept

    whole = "blk.1.ffn_gate_up_exps.weight"
    written(folder := write_case(tmp_path / "b", "qwen3_5_moe_text"))
    for change, message in (
        (odd, "expected rows of gate and as many of up"),
        (both, f"{whole} is there, and blk.1.ffn_up_exps.weight too; expected one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_gguf(again(folder / "model.gguf", change))


def test_layers_behind_the_models_own_are_left_out(tmp_path):
    folder = write_case(tmp_path, "glm4_moe")
    before = written(folder)
    more = {"blk.3.nextn.eh_proj.weight": np.ones((32, 64), np.float32)}
    counts = {"block_count": 4, "nextn_predict_layers": 1}
    path = again(folder / "model.gguf", lambda arrays: arrays.update(more), **counts)
    made = open_gguf(path)
    assert set(made) == set(before) and made.config == before.config
    assert "layers from 3 on (1 in all), which predict further tokens" in made.notes[0]


def test_gemmas_norms_have_their_1(tmp_path):
    folder = write_case(tmp_path, "gemma3_text")
    written(folder, "f16")
    _, tensors = raw(folder / "model.gguf")
    for theirs, ours in (
        ("output_norm", "model.norm"),
        ("blk.6.attn_q_norm", "model.layers.6.self_attn.q_norm"),
        ("blk.6.post_ffw_norm", "model.layers.6.post_feedforward_layernorm"),
    ):
        wanted = Checkpoint(folder)[f"{ours}.weight"] + np.float32(1)
        np.testing.assert_array_equal(tensors[f"{theirs}.weight"].data, wanted)


# --- tensors of other writers


@pytest.mark.parametrize(
    "kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "MXFP4"]
)
def test_quantized_tensors_are_dequantized_as_gguf_does(tmp_path, kind):
    kind, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x7c: scales, wherever they are, are finite.
    q = rng.integers(0, 0x7C, (32, 256 // block * size), np.uint8)
    hidden = {"llama.embedding_length": 256, "llama.attention.key_length": 8}
    tensors = {"blk.0.attn_q.weight": (q, kind), "blk.0.attn_output.weight": (q, kind)}
    made = open_gguf(llama(tmp_path / "m.gguf", hidden, **tensors))
    wanted = gguf.quants.dequantize(q, kind)
    layer = "model.layers.0.self_attn"
    assert made.infos[f"{layer}.q_proj.weight"].shape == (32, 256)
    assert made.infos[f"{layer}.q_proj.weight"].dtype == np.float32
    np.testing.assert_array_equal(made[f"{layer}.o_proj.weight"], wanted)
    order = np.arange(32).reshape(4, 4, 2).swapaxes(1, 2).ravel()
    np.testing.assert_array_equal(made[f"{layer}.q_proj.weight"], wanted[order])


def in_mxfp4(folder: Path, *ends: str) -> Path:
    """Writes a folder as a file whose tensors with names that end so are in MXFP4."""
    written(folder)
    meta, tensors = raw(folder / "model.gguf")
    meta = {k: v for k, v in meta.items() if not k.startswith("GGUF.")}
    kind, arrays = gguf.GGMLQuantizationType.MXFP4, {}
    for name, tensor in tensors.items():
        packs = name.endswith(ends)
        packed = (gguf.quants.quantize(tensor.data, kind), kind) if packs else None
        arrays[name] = packed or tensor.data
    return write_raw(folder / "mxfp4.gguf", meta, arrays)


EXPERTS_OF_32 = {
    "gpt_oss": {"intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32},
}


@pytest.mark.parametrize(
    ("case", "arch", "method"),
    [
        ("gpt_oss", "gpt-oss", "mxfp4"),
        ("qwen3_moe", "qwen3moe", "qlora_jax_two_formats"),
    ],
)
def test_experts_in_mxfp4_are_kept_and_mean_what_gguf_decodes(
    tmp_path, case, arch, method
):
    folder = write_case(tmp_path / "a", case, **EXPERTS_OF_32[case])
    path = in_mxfp4(folder, "exps.weight")
    source, (_, tensors) = open_source(path), raw(path)
    config, made, kept = source.config, source.tensors, 0
    for name, place in names_of(arch, config).items():
        (stored, *_), expert = place.stored, place.expert
        if not stored.endswith("exps.weight"):
            continue
        assert name not in made
        q, tensor = bitsandbytes.read(made, name), tensors[stored]
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[expert]
        np.testing.assert_array_equal(q.decode("float32"), wanted)
        size = sum(made.stored(f"{name}_{part}")[1] for part in ("blocks", "scales"))
        assert sum(array.nbytes for array in q.storage(name).values()) == size
        assert size * 8 == 4.25 * wanted.size
        kept += 1
    packed = [t for t in tensors.values() if t.tensor_type.name == "MXFP4"]
    assert kept == sum(len(tensor.data) for tensor in packed) > 0
    model, _ = load(source, dtype="float32")
    save_model(model, tmp_path / "saved", source=source)
    said = json.loads((tmp_path / "saved/config.json").read_text())
    assert said["quantization_config"]["quant_method"] == method
    back, _ = load(tmp_path / "saved", dtype="float32")
    for a, b in zip(tiny.frozen(back), tiny.frozen(model), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="has quantized weights"):
        write_gguf(tmp_path / "saved", tmp_path / "m.gguf")


def test_of_experts_that_are_not_all_in_mxfp4_each_is_decoded(tmp_path):
    folder = write_case(tmp_path, "gpt_oss", **EXPERTS_OF_32["gpt_oss"])
    source = open_source(in_mxfp4(folder, "up_exps.weight", "attn_q.weight"))
    assert "of 36 linears of experts 12 are in MXFP4; they are" in source.notes[0]
    assert "quantization_config" not in source.hf
    _, tensors = raw(folder / "mxfp4.gguf")
    for name, stored in (
        ("mlp.experts.2.up", "ffn_up_exps"),
        ("self_attn.q", "attn_q"),
    ):
        tensor = tensors[f"blk.1.{stored}.weight"]
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = source.tensors[f"model.layers.1.{name}_proj.weight"]
        np.testing.assert_array_equal(got, wanted[2] if "exps" in stored else wanted)


def test_asking_for_a_name_reads_nothing(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_1  # none can dequantize it
    block, size = gguf.GGML_QUANT_SIZES[kind]
    q = np.zeros((32, 32 // block * size), np.uint8)
    path = llama(tmp_path / "m.gguf", **{"blk.0.attn_v.weight": (q, kind)})
    made, name = open_gguf(path), "model.layers.0.self_attn.v_proj.weight"
    assert name in made and f"{name}.absmax" not in made and name in list(made)
    with pytest.raises(CheckpointError, match=rf"{name} in .*m\.gguf.*Q8_1"):
        made[name]


def test_a_tensor_of_no_such_architecture_keeps_its_name(tmp_path):
    more = {"blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)}
    assert "blk.0.ffn_gate_inp.weight" in open_gguf(llama(tmp_path / "m.gguf", **more))


# --- settings


def test_what_a_file_does_not_say_is_as_llama_cpp_takes_it(tmp_path):
    meta = {"llama.context_length": None}
    config = open_gguf(llama(tmp_path / "m.gguf", meta)).config
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 8)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (10000.0, 1e-5)
    assert config["tie_word_embeddings"] and not config["attention_bias"]
    heads = {"llama.attention.head_count_kv": [2]}  # one a layer
    bias = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    output = {"output.weight": np.ones((VOCAB, 32), np.float32)}
    config = open_gguf(llama(tmp_path / "n.gguf", heads, **bias, **output)).config
    assert config["num_key_value_heads"] == 2
    assert config["attention_bias"] and not config["tie_word_embeddings"]


def renamed(arch: str, **more: Any) -> dict[str, Any]:
    made = {key.replace("llama", arch): value for key, value in LLAMA.items()}
    more = {f"{arch}.{key}": value for key, value in more.items()}
    return made | more | {"general.architecture": arch}


def test_gemma_2_and_3_have_settings_that_no_metadata_hold(tmp_path):
    embedding = {"token_embd.weight": np.ones((VOCAB, 32), np.float32)}
    path, more = tmp_path / "m.gguf", {"attention.key_length": 16}
    config = decoder_of(
        open_gguf(write_raw(path, renamed("gemma2", **more), embedding)).config
    )
    assert config.specs[0].mixer.window == 4096 and config.attention_scale == 0.25
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    more["block_count"] = 46  # the 27B
    config = open_gguf(write_raw(path, renamed("gemma2", **more), embedding)).config
    assert config["query_pre_attn_scalar"] == 8
    more = {"attention.sliding_window": 512, "block_count": 7, "rope.freq_base": 1e6}
    config = decoder_of(
        open_gguf(write_raw(path, renamed("gemma3", **more), embedding)).config
    )
    assert [spec.mixer.window for spec in config.specs] == [512] * 5 + [None, 512]
    assert config.rope_theta == 1e6 and config.specs[0].mixer.rope.theta == 10000.0
    more.pop("attention.sliding_window")
    config = decoder_of(
        open_gguf(write_raw(path, renamed("gemma3", **more), embedding)).config
    )
    assert {spec.mixer.window for spec in config.specs} == {None}


def test_a_granite_without_scales_has_those_of_llama_cpp(tmp_path):
    embedding = {"token_embd.weight": np.ones((VOCAB, 32), np.float32)}
    scales = {"logit_scale": 4.0, "embedding_scale": 0.0}
    path = write_raw(tmp_path / "m.gguf", renamed("granite", **scales), embedding)
    config = decoder_of(made := open_gguf(path).config)
    assert made["model_type"] == "granite"
    assert (config.attention_scale, config.logit_scale) == (8**-0.5, 0.25)
    assert (config.embedding_scale, config.residual_scale) == (1.0, 1.0)
    more = scales | {"rope.scaling.finetuned": False}
    path = write_raw(tmp_path / "n.gguf", renamed("granite", **more), embedding)
    config = decoder_of(made := open_gguf(path).config)
    assert made["model_type"] == "granitemoehybrid"
    assert {spec.mixer.rope for spec in config.specs} == {"none"}
    sizes = {"conv_kernel": 4, "state_size": 8, "group_count": 1}
    sizes |= {"time_step_rank": 4, "inner_size": 64}
    more = {f"ssm.{key}": value for key, value in sizes.items()}
    more |= {"block_count": 2, "attention.head_count_kv": [0, 2]}
    path = write_raw(tmp_path / "o.gguf", renamed("granitehybrid", **more), embedding)
    config = decoder_of(made := open_gguf(path).config)
    assert (config.attention_scale, config.logit_scale) == (8**-0.5, 1)
    assert config.specs[0].mixer.inner_size == 64
    assert config.specs[1].mixer.rope == "global" and config.num_kv_heads == 2


def test_yarn_is_read(tmp_path):
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 32,
        "yarn_beta_fast": 16.0,
        "yarn_attn_factor": 1.1386294,  # 0.1 log 4 + 1, as OLMo 3's files say it
    }
    meta = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    config = decoder_of(open_gguf(llama(tmp_path / "m.gguf", meta)).config)
    assert config.rope_scaling.kind == "yarn" and config.rope_scaling.factor == 4
    assert config.rope_scaling.original_max_position == 32
    assert (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow) == (16, 1)


def test_rotary_factors_that_no_settings_make_are_kept(tmp_path):
    factors = np.array([1, 1.5, 1.25, 4], np.float32)
    tensors = {"rope_freqs.weight": factors}
    made = open_gguf(llama(tmp_path / "m.gguf", **tensors))
    scaling = decoder_of(made.config).rope_scaling
    assert scaling.short_factor == scaling.long_factor == tuple(factors.tolist())
    assert scaling.attention_factor == 1 and "rope_freqs.weight" not in made


# --- tokenizers


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizers_come_back(tmp_path, pre):
    folder = write_tokenizer(write_case(tmp_path, "qwen2"), byte_level(pre))
    ours, theirs = Tokenizer.open(folder), written(folder).tokenizer()
    assert raw(folder / "model.gguf")[0]["tokenizer.ggml.pre"] == pre
    assert ours is not None and theirs is not None
    for text in (PROBE, TEXT, "<tool>a</s> <s>", ""):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == ours.decode(ids)
    assert theirs.vocab_size == ours.vocab_size
    assert theirs.eos_ids == ours.eos_ids and theirs.bos_id is None
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.chat(messages) == ours.chat(messages) == "<s><user>hi"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(tmp_path, prefix):
    made = sentencepiece(prefix)
    folder = write_tokenizer(write_case(tmp_path, "gemma"), made, add_bos_token=True)
    ours, theirs = Tokenizer.open(folder), written(folder).tokenizer()
    meta, _ = raw(folder / "model.gguf")
    assert meta["tokenizer.ggml.add_space_prefix"] == prefix
    assert meta["tokenizer.ggml.model"] == "llama"
    assert meta["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert ours is not None and theirs is not None
    for text in (PROBE, TEXT, "the an  quant</s> then", " he he ", ""):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_id, theirs.eos_ids) == (1, (2,))


def test_a_texts_first_id_and_ends_come_from_the_folder(tmp_path):
    made, folder = byte_level(), write_case(tmp_path, "qwen2")
    bos, eos, tool = (made.token_to_id(t) for t in ("<s>", "</s>", "<tool>"))
    special = [("<s>", bos)]
    made.post_processor = processors.TemplateProcessing("<s> $A", None, special)
    generation = {"eos_token_id": [tool, eos]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = written(write_tokenizer(folder, made)).tokenizer()
    assert tokenizer is not None and tokenizer.bos_id == bos
    assert tokenizer.eos_ids == (eos, tool)
    write_tokenizer(folder, made, add_bos_token=False)
    write_gguf(folder, folder / "model.gguf", overwrite=True)
    tokenizer = open_gguf(folder / "model.gguf").tokenizer()
    assert tokenizer is not None and tokenizer.bos_id is None


TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "<u>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}


def test_bos_is_put_where_llama_cpp_would_without_being_told(tmp_path):
    tokenizer = open_gguf(llama(tmp_path / "m.gguf", TOKENIZER)).tokenizer()
    assert tokenizer is not None and tokenizer.bos_id == 3
    assert tokenizer.encode("ab<u>b") == [2, 4, 1]
    other = TOKENIZER | {"tokenizer.ggml.pre": "smollm"}
    tokenizer = open_gguf(llama(tmp_path / "n.gguf", other)).tokenizer()
    assert tokenizer is not None and tokenizer.bos_id is None


def test_phi_3s_special_tokens_take_spaces_along(tmp_path):
    made = sentencepiece()
    made.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    folder = write_tokenizer(write_case(tmp_path, "phi3"), made)
    ours, theirs = Tokenizer.open(folder), written(folder).tokenizer()
    assert ours is not None and theirs is not None
    text = "the<|end|>\n an<s> b"
    assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; known: gpt2, llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known: gpt-2, smollm"),
        ({"pre": None}, "tokenizer.ggml.pre is 'default'"),
        ({"merges": ["a c"]}, "its tokenizer is damaged: .*out of vocabulary"),
        ({"merges": None}, "its tokenizer is damaged: KeyError"),
        ({"token_type": [1, 1]}, "its tokenizer is damaged"),
        ({"bos_token_id": 9}, "its tokenizer is damaged: IndexError"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_needs_one_beside(tmp_path, changes, message):
    more = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    made = open_gguf(llama(tmp_path / "m.gguf", TOKENIZER | more))
    with pytest.raises(CheckpointError, match=message) as error:
        made.tokenizer()
    assert "m.gguf" in str(error.value) and "tokenizer.json beside" in str(error.value)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = made.tokenizer()
    assert (
        tokenizer is not None
        and tokenizer.encode(TEXT) == byte_level().encode(TEXT).ids
    )


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    made = open_gguf(llama(tmp_path / "m.gguf"))
    assert made.tokenizer() is None
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert made.tokenizer() is not None


# --- files that are refused


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.gguf is no file"):
        open_gguf(tmp_path / "m.gguf")


def swapped(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "cannot be read as GGUF"),
        (lambda whole: b"PK" + whole[2:], "it begins with b'PKUF'"),
        (lambda whole: whole[:4] + b"\x09" + whole[5:], "its version is 9"),
        (lambda whole: whole[:8] + b"\xff" * 8 + whole[16:], "settings and"),
        (lambda whole: whole[:24] + b"\xff" * 8 + whole[32:], "byte 32 begins"),
        (lambda whole: whole[:20], "truncated or corrupt"),
        (lambda whole: whole[:300], "truncated or corrupt"),
        (lambda whole: whole[:-100], "truncated or corrupt, fetch it again"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage: Callable[[bytes], bytes], message):
    path = llama(tmp_path / "m.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        open_gguf(path)
    assert f"{path} ({path.stat().st_size} bytes)" in str(error.value)


def test_a_big_endian_file_is_refused(tmp_path):
    swapped(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="in another order"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"general.architecture": "bert"}, "'bert'; known: llama, qwen2, qwen3, gemma"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        (renamed("gemma", expert_count=8), "it is a mixture of experts"),
        (
            renamed("qwen3moe", expert_count=8, expert_gating_func=2),
            "expert_gating_func is 2; expected a softmax",
        ),
        (
            renamed("olmoe", expert_count=8, expert_group_count=4),
            "expert_group_count is 4, and no olmoe has any",
        ),
        ({"split.count": 3}, "1 of 3 parts.*llama-gguf-split"),
        (
            {"llama.block_count": None, "llama.embedding_length": None},
            r"2 problems(.|\n)*embedding_length is missing(.|\n)*block_count is missing",
        ),
        (
            {"llama.feed_forward_length": [64, 32]},
            r"differs between layers: \[64, 32\]",
        ),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.block_count": "two"}, "block_count is 'two', expected a whole number"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4, a part of a head"),
        ({"llama.rope.scaling.type": "ntk"}, "scaling.type is 'ntk'; known: linear"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.attn_factor": 1.5,
            },
            "attn_factor is 1.5; not supported",
        ),
    ],
)
def test_settings_that_are_not_ours_are_refused(tmp_path, meta, message):
    path = llama(tmp_path / "m.gguf", meta)
    with pytest.raises(CheckpointError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_wrong_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="token_embd.weight is missing"):
        open_gguf(write_raw(tmp_path / "m.gguf", LLAMA))
    tensors = {"rope_freqs.weight": np.ones(3, np.float32)}
    with pytest.raises(CheckpointError, match="3 factors, expected 4"):
        open_gguf(llama(tmp_path / "m.gguf", **tensors))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        open_gguf(tmp_path / "m.gguf")


# --- folders that are refused


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ShapeError, match="'q4_0', expected f32, f16, q8_0, bf16"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "q4_0")


def test_a_file_is_not_overwritten_unasked(tmp_path):
    folder, out = write_case(tmp_path, "qwen2"), tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_gguf(folder, out)
    assert out.read_text() == "mine"
    size = write_gguf(folder, out, overwrite=True)["bytes"]
    assert size == out.stat().st_size and not list(tmp_path.glob("*.partial"))
    with pytest.raises(OutputExistsError, match="exists"):
        write_gguf(folder, folder, overwrite=True)
    with pytest.raises(CheckpointError, match="made from a dense folder"):
        write_gguf(out, tmp_path / "n.gguf")


def test_4_bit_folders_are_refused(tmp_path):
    save_model(quantize(tiny.decoder()), tmp_path)
    with pytest.raises(CheckpointError, match="has quantized weights"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("helium", {}, "a helium cannot be written as GGUF; known: arcee, cohere, coh"),
        ("llama_dynamic", {}, "rope_scaling is .*kind='dynamic'.*would take None"),
        ("llama_yarn", {}, "beta_fast=1.0.*would take .*beta_fast=32.0"),
        ("mistral", {}, "sliding_window is 8; llama.cpp would take None"),
        ("qwen2_window", {}, "layers is .*window=8"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "attention_scale is"),
        ("qwen3", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("exaone4", {"sliding_window": 8}, "layers is .*window=8"),
        (
            "seed_oss",
            {"attention_out_bias": True},
            "output_bias is True; llama.cpp would take False",
        ),
        ("cohere2", {"tie_word_embeddings": False}, "no cohere2 of llama.cpp has it"),
        (
            "granitemoehybrid",
            {"mamba_expand": 4, "mamba_n_heads": 16, "mamba_conv_bias": False},
            "mamba_expand is 4; llama.cpp would take 2(.|\n)*mamba_conv_bias is False",
        ),
        (
            "granitemoehybrid",
            {"layer_types": ["attention"] * 3},
            "position_embedding_type is not rope; llama.cpp rotates",
        ),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"rope_theta": 100.0}}},
            "layers is .*theta=500000.0",
        ),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(
    tmp_path, case, changes, message
):
    folder = write_case(tmp_path, case, **changes)
    with pytest.raises(CheckpointError, match=message):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_values_that_the_dtype_cannot_hold_are_named(tmp_path):
    folder = write_case(tmp_path, "qwen2")
    tensors = {name: np.array(w) for name, w in Checkpoint(folder).items()}
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    tensors[up][1, 2], tensors[norm][3] = 1e5, np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit f16 .2 problems") as error:
        write_gguf(folder, tmp_path / "m.gguf")
    assert up in str(error.value) and norm in str(error.value)
    assert not list(tmp_path.glob("*.gguf*"))
    with pytest.raises(CheckpointError, match=f"1 problem(.|\n)*{norm}"):
        write_gguf(folder, tmp_path / "m.gguf", "bf16")


def unigram() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))


def whitespace() -> tokenizers.Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def large() -> tokenizers.Tokenizer:
    made = byte_level()
    made.add_tokens([f"<{i}>" for i in range(30)])
    return made


def lowercase() -> tokenizers.Tokenizer:
    made = sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), made.normalizer])
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, "is of type Unigram"),
        (tiny.byte_tokenizer, "of type BPE with 0 merges"),
        (whitespace, "splits text in a way that no GGUF file names"),
        (lowercase, "splits text in a way that no GGUF file names"),
        (large, r"ids up to \d+, but config.json a vocab_size of 320"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(tmp_path, make, message):
    folder = write_tokenizer(write_case(tmp_path, "qwen2"), make())
    with pytest.raises(CheckpointError, match=message):
        write_gguf(folder, tmp_path / "m.gguf")


def test_a_folder_needs_a_tokenizer(tmp_path):
    (write_case(tmp_path, "qwen2") / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


# --- real files


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
)
def test_real_files_are_read_as_the_folders_made_of_them(name):
    cache = Path(os.environ.get("QLORA_JAX_MODELS", "~/.cache/qlora_jax_models"))
    folder = cache.expanduser() / name
    path = folder.with_name(f"{name}.gguf")
    if not (path.exists() and folder.is_dir()):
        pytest.skip(f"needs models that no registry is asked for here: {path}")
    made, stored = open_gguf(path), Checkpoint(folder)
    # The folder's embedding is the head's, which the file stores less coarsely.
    head = "lm_head.weight" if "lm_head.weight" in made else "model.embed_tokens.weight"
    assert {*made, head} - {"lm_head.weight"} == set(stored)
    for ours in stored:
        name = head if ours == "model.embed_tokens.weight" else ours
        np.testing.assert_array_equal(made[name].astype(np.float16), stored[ours])
    config = json.loads((folder / "config.json").read_text())
    ours, theirs = decoder_of(config), decoder_of(made.config)
    assert theirs.tie_word_embeddings == ("lm_head.weight" not in made)
    assert {**vars(theirs), "tie_word_embeddings": True} == vars(ours)
    tokenizer, other = Tokenizer.open(folder), made.tokenizer()
    assert tokenizer is not None and other is not None
    text = PROBE + Path(__file__).read_text() + "<|im_start|>user\nhi<|im_end|>"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.eos_ids == tokenizer.eos_ids
    assert other.chat_template == tokenizer.chat_template
