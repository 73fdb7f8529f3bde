"""Model folders, live: ours open in transformers and bitsandbytes, and theirs in ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

import qlora_jax as qlora
from qlora_jax import QuantConfig, QuantizedTensor
from qlora_jax.cli.main import main
from qlora_jax.models import FAMILIES, Decoder
from qlora_jax.nn import QuantizedLinear

pytestmark = pytest.mark.interop

ORDER = 3e-5
"""Absolute, of logits of size 10: float32 sums in another order."""
QUANTS = {
    "nf4 twice": QuantConfig(),
    "nf4": QuantConfig(double_quant=False),
    "fp4 twice": QuantConfig(codebook="fp4"),
    "fp4": QuantConfig(codebook="fp4", double_quant=False),
}


def theirs(quant: QuantConfig, **more: Any) -> dict[str, Any]:
    """Says the same to bitsandbytes."""
    return {
        "bnb_4bit_quant_type": quant.codebook,
        "bnb_4bit_use_double_quant": quant.double_quant,
        **more,
    }


def decoded(model: Decoder, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns every 4-bit weight by its name on disk, in float32 after `dtype`."""
    names = FAMILIES[model.config.model_type].NAMES
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        stack = variable.get_value()
        if isinstance(stack, QuantizedTensor):
            name = names[".".join(map(str, path))]
            for i in range(model.config.num_layers):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
                weight = qlora.dequantize(one, dtype)
                found[name.format(i)] = np.asarray(weight, np.float32)
    return found


def same_weights(
    side: Any, folder: Path, model: Decoder, out: Path, dtype: str
) -> None:
    """Compares all 4-bit weights of a folder with the model's, bit by bit."""
    side("decoded", base=folder, out=out)
    wanted, found = dict(np.load(out)), decoded(model, dtype)
    assert found.keys() == wanted.keys() and len(found) == 2 * 7
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def same_logits(
    side: Any, folder: Path, model: Decoder, ids: Path, out: Path
) -> dict[str, Any]:
    """Compares the logits of a folder in transformers with the model's."""
    answer = side("logits", base=folder, ids=ids, out=out)
    ours = tiny.logits(model, np.load(ids))
    np.testing.assert_allclose(ours, np.load(out)["logits"], atol=ORDER, rtol=0)
    assert np.abs(ours).max() > 3  # not a comparison of nothings
    return answer


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_our_4_bit_folder_opens_in_bitsandbytes(
    side, bases, ids, tmp_path, name, quant
):
    model, _ = qlora.load(bases[name], QUANTS[quant], "float32")
    folder = tmp_path / "ours"
    qlora.save_model(model, folder, source=bases[name])
    same_weights(side, folder, model, tmp_path / "decoded.npz", "float32")
    same_logits(side, folder, model, ids, tmp_path / "logits.npz")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_4_bit_folder_of_bitsandbytes_opens_in_ours(
    side, bases, ids, tmp_path, name, quant
):
    folder, wanted = tmp_path / "theirs", QUANTS[quant]
    side("quantize", base=bases[name], quant=theirs(wanted), out=folder)
    model, _ = qlora.load(folder, dtype="float32")
    linear = model.layers.attn.k_proj
    assert isinstance(linear, QuantizedLinear)
    q = linear.quantized
    assert (q.codebook, q.double_quant) == (wanted.codebook, wanted.double_quant)
    same_weights(side, folder, model, tmp_path / "decoded.npz", "float32")
    same_logits(side, folder, model, ids, tmp_path / "logits.npz")


def test_bfloat16_folders_decode_to_the_same_bits_both_ways(side, bases, tmp_path):
    config = json.loads((bases["qwen2"] / "config.json").read_text())
    base = tmp_path / "base"
    side("make", config=config, dtype="bfloat16", out=base)
    model, _ = qlora.load(base, QuantConfig(), "bfloat16")
    qlora.save_model(model, tmp_path / "ours", source=base)
    out = tmp_path / "decoded.npz"
    same_weights(side, tmp_path / "ours", model, out, "bfloat16")
    quant = theirs(QuantConfig(), bnb_4bit_compute_dtype="bfloat16")
    folder = tmp_path / "theirs"
    side("quantize", base=base, quant=quant, dtype="bfloat16", out=folder)
    model, _ = qlora.load(folder)
    same_weights(side, folder, model, out, "bfloat16")


def test_codes_that_bitsandbytes_stores_as_bfloat16_open_in_ours(
    side, bases, ids, tmp_path
):
    quant = theirs(QuantConfig(), bnb_4bit_quant_storage="bfloat16")
    folder = tmp_path / "theirs"
    side("quantize", base=bases["llama"], quant=quant, out=folder)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == "bfloat16"
    model, _ = qlora.load(folder, dtype="float32")
    same_weights(side, folder, model, tmp_path / "decoded.npz", "float32")
    same_logits(side, folder, model, ids, tmp_path / "logits.npz")


def adapted(base: Path, quant: QuantConfig | None) -> Decoder:
    model, _ = qlora.load(base, quant, "float32")
    return tiny.adapted(model)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_merged_folder_opens_in_transformers(side, bases, ids, tmp_path, name):
    merged = qlora.merge(adapted(bases[name], QuantConfig()), dtype="float32")
    qlora.save_model(merged, tmp_path / "whole", source=bases[name])
    shards = tmp_path / "shards"
    qlora.save_model(merged, shards, source=bases[name], shard_bytes=100_000)
    assert len(list(shards.glob("*.safetensors"))) > 2
    tied = name == "qwen2"
    for folder in (tmp_path / "whole", shards):
        said = same_logits(side, folder, merged, ids, tmp_path / "logits.npz")
        assert said["tied"] == tied
        assert not list(folder.glob("*quantization*"))
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied


def test_a_model_quantized_again_after_merging_opens_in_bitsandbytes(
    side, bases, ids, tmp_path
):
    model = adapted(bases["llama"], QuantConfig())
    merged = qlora.merge(model, requantize=QuantConfig(codebook="fp4"))
    qlora.save_model(merged, tmp_path / "m", source=bases["llama"])
    same_weights(side, tmp_path / "m", merged, tmp_path / "decoded.npz", "float32")
    same_logits(side, tmp_path / "m", merged, ids, tmp_path / "logits.npz")


@pytest.fixture
def talking(bases, tmp_path) -> Path:
    """The tiny Llama with a tokenizer, a chat template and a generation config."""
    folder = tmp_path / "talking"
    shutil.copytree(bases["llama"], folder)
    tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    settings = {"eos_token_id": [tiny.EOS, tiny.USER], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def called(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


@pytest.mark.parametrize("kind", ["quantized", "merged"])
def test_a_folder_of_the_commands_chats_alike_in_transformers(
    side, talking, tmp_path, kind
):
    folder = tmp_path / kind
    flags = ["--model", talking, "--out", folder, "--dtype", "float32"]
    if kind == "quantized":
        called("quantize", *flags)
    else:
        model = adapted(talking, None)
        graphdef, lora, base = qlora.split(model)
        config = qlora.LoRAConfig(rank=4, alpha=8.0)
        qlora.save_adapter(tmp_path / "adapter", lora, config)
        called("merge", *flags, "--adapter", tmp_path / "adapter")
    messages = [{"role": "user", "content": "how much is 2+3, naïvely?"}]
    said = side("chat", base=folder, messages=messages, count=24)
    model, tokenizer = qlora.load(folder, dtype="float32")
    assert tokenizer is not None
    prompt = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=True))
    assert said["prompt"] == prompt
    answer = qlora.generate(
        model,
        [prompt],
        qlora.SampleConfig(max_new_tokens=24),
        eos_ids=tokenizer.eos_ids,
    )[0]
    # PyTorch's answer has the token that ended it, if one did.
    assert said["answer"][: len(answer)] == answer
    assert set(said["answer"][len(answer) :]) <= {tiny.EOS, tiny.USER}
    assert said["text"] == tokenizer.decode(answer)
    assert said["settings"]["eos_token_id"] == [tiny.EOS, tiny.USER]
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (talking / name).read_bytes()


def test_transformers_does_not_take_int8_tables_for_values(side, bases, ids, tmp_path):
    folder, tables = tmp_path / "int8", {"embedding": "int8", "head": "int8"}
    model, _ = qlora.load(bases["llama"], QuantConfig(), "float32", **tables)
    qlora.save_model(model, folder, source=bases["llama"])
    said = side.fails("logits", base=folder, ids=ids, out=tmp_path / "logits.npz")
    assert "ignore_mismatched_sizes" in said
