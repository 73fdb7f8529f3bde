"""Readers of models: config.json, tensors, 4-bit weights, GGUF.

What is read is also used, as far as that takes no compilation: a damaged file may open and
fail later. An `assert` here says what must hold of an input that was not refused.
"""

import functools
import json
import math
import random
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_jax.models import abstract
from qlora_jax.nn.quantizing import quantize
from qlora_jax.nn.rope import inverse_frequencies
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf.write import write_gguf
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.source import open_source
from scripts.torture import mutate
from scripts.torture.reader import BASE, ROOT, Reader, one_of


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    cases = runpy.run_path(str(ROOT / "tests" / "models" / "family_cases.py"))["CASES"]
    inner = cases["gemma3_text"]
    packed = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head"],
    }
    return cases | {
        "gemma3": {"model_type": "gemma3", "text_config": inner, "eos_token_id": [1]},
        "packed": cases["qwen2"] | {"quantization_config": packed},
        "tables": cases["qwen2"]
        | {
            "quantization_config": {
                "quant_method": bitsandbytes.WITH_INT8,
                "int8_tables": ["model.embed_tokens"],
                "linears": packed,
            }
        },
    }


def _damage_config(folder: Path, rng: random.Random) -> None:
    every = _configs()
    path = folder / "config.json"
    path.write_text(json.dumps(every[rng.choice([*every])]))
    mutate.of_json(path, rng)


def _make_configs(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_configs()["mistral"]))


_shaped: set[Any] = set()


def _read_config(folder: Path) -> None:
    source = open_source(folder)
    config, _ = source.config, source.stored
    frequencies = inverse_frequencies(
        config.rotary_dim or config.head_dim, config.rope_theta, config.rope_scaling, 64
    )
    assert np.isfinite(np.asarray(frequencies)).all(), "rotary frequencies are NaN"
    numbers = [v for v in vars(config).values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers)), "a setting is not finite"
    if config not in _shaped and len(_shaped) % 40 == 0:
        abstract(config)
    _shaped.add(config)


INDEX = "model.safetensors.index.json"


def _make_safetensors(folder: Path) -> None:
    x = np.arange(24, dtype=np.float32)
    save_file(
        {
            "a": x.reshape(4, 6),
            "b": x.astype(np.float16),
            "c": x[:0],
            "d": np.asarray(x[0]),
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _header(data: bytes, change: Callable[[Any], str]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    text = change(json.loads(data[8 : 8 + size])).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def damage_safetensors(path: Path, rng: random.Random) -> None:
    """Damages a file of tensors: mostly its header."""
    if rng.random() < 0.3:
        mutate.of_bytes(path, rng)
        return
    data = path.read_bytes()
    path.write_bytes(
        _header(data, lambda tree: mutate.json_text(mutate.mutated(tree, rng)))
    )


def _read_safetensors(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint:
        np.asarray(checkpoint[name]).sum(dtype=np.float32)


def _make_index(folder: Path) -> None:
    x = np.ones((2, 3), np.float32)
    for i in (1, 2):
        save_file({f"x{i}": x}, folder / f"model-0000{i}-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 48},
        "weight_map": {f"x{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LINEAR = "model.layers.0.self_attn.q_proj.weight"


def _make_bnb(folder: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    made: Any = quantize(_Linear(w))
    save_file(
        {
            k: np.asarray(v)
            for k, v in made.linear.kernel.get_value().storage(LINEAR).items()
        },
        folder / "model.safetensors",
    )


def _Linear(w: np.ndarray) -> Any:  # noqa: N802
    from flax import nnx

    from qlora_jax.nn import Linear

    class One(nnx.Module):
        def __init__(self) -> None:
            self.linear = Linear(jax.numpy.asarray(w))

    return One()


def _damage_bnb(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    name = rng.choice([*tensors])
    if name.endswith("__nf4") and rng.random() < 0.9:
        state = json.loads(tensors[name].tobytes())
        # Mutated texts may have halves of surrogate pairs, which UTF-8 cannot: "?" is another
        # damage that is as good.
        text = mutate.json_text(mutate.mutated(state, rng)).encode(errors="replace")
        tensors[name] = np.frombuffer(text, np.uint8)
    else:
        damage_array(tensors, name, rng)
    save_file(tensors, path)


def damage_array(tensors: dict[str, np.ndarray], name: str, rng: random.Random) -> None:
    """Changes the dtype, the shape or the values of an array, or leaves it away."""
    array = tensors[name]
    how = rng.randrange(8)
    if how == 0:
        del tensors[name]
    elif how == 1:
        dtype = rng.choice(("float16", "int8", "float64", "int32", "uint8", "bool"))
        tensors[name] = np.ascontiguousarray(array.astype(dtype))
    elif how == 2:
        tensors[name] = np.ascontiguousarray(array.reshape(-1)[: array.size // 2])
    elif how == 3:
        shape = rng.choice(((1, -1), (-1, 1), (1, 1, 1, -1), (-1,)))
        tensors[name] = array.reshape(shape)
    elif how == 4:
        tensors[name] = np.zeros((0,), array.dtype)
    elif how == 5:
        tensors[name] = np.asarray(array.reshape(-1)[:1].sum(), array.dtype)
    elif how == 6:
        tensors[rng.choice((name + "x", name[:-1], "x"))] = tensors.pop(name)
    else:
        data = bytearray(array.tobytes())
        for _ in range(4):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 255, 127))
        tensors[name] = np.frombuffer(bytes(data), array.dtype).reshape(array.shape)


def _read_bnb(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    if bitsandbytes.is_packed(checkpoint, LINEAR):
        q = bitsandbytes.read(checkpoint, LINEAR)
        for leaf in jax.tree.leaves(q):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), "scales are NaN"


def _make_gguf(folder: Path) -> None:
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    base = folder / "base"
    base.mkdir()
    hf = json.loads((BASE / "config.json").read_text()) | small
    (base / "config.json").write_text(json.dumps(hf))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(BASE / name, base / name)
    rng = np.random.default_rng(0)
    from qlora_jax.models import hf_table
    from qlora_jax.sources.reader import wanted_of

    config = open_source(base).config
    tensors = {
        name: rng.standard_normal(shape).astype(np.float16)
        for names, _, shape in wanted_of(abstract(config), hf_table(config)).values()
        for name in names
    }
    save_file(tensors, base / "model.safetensors")
    write_gguf(base, folder / "model.gguf")
    shutil.rmtree(base)


def _damage_gguf(folder: Path, rng: random.Random) -> None:
    path = folder / "model.gguf"
    data = path.read_bytes()
    head = data.find(b"blk.0.") if rng.random() < 0.8 else len(data)
    if rng.random() < 0.3:
        # One of the words that sizes, counts, kinds and offsets are written in.
        at = rng.randrange(8, head - 8)
        word = rng.choice(
            (0, 1, 2, 8, 255, 2**16, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1)
        )
        size = rng.choice((4, 8))
        word = (word % 2 ** (8 * size)).to_bytes(size, "little")
        path.write_bytes(data[:at] + word + data[at + size :])
        return
    path.write_bytes(mutate.damaged(data[:head], rng) + data[head:])


def _read_gguf(folder: Path) -> None:
    source = open_source(folder / "model.gguf")
    config, tokenizer = source.config, source.tokenizer
    assert math.isfinite(config.rms_norm_eps) and config.rms_norm_eps > 0
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("some text"))
    for name in list(source.tensors)[:4]:
        np.asarray(source.tensors[name], np.float32).sum()


READERS: dict[str, Reader] = {
    "config": Reader(_make_configs, _damage_config, _read_config),
    "safetensors": Reader(
        _make_safetensors,
        one_of(("model.safetensors", damage_safetensors)),
        _read_safetensors,
    ),
    "index": Reader(_make_index, one_of((INDEX, mutate.of_json)), _read_safetensors),
    "bnb": Reader(_make_bnb, _damage_bnb, _read_bnb),
    "gguf": Reader(_make_gguf, _damage_gguf, _read_gguf, heavy=True),
}
