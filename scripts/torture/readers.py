"""The readers that are tried: a good input of each, how it is damaged, how it is read.

What is read is also used, as far as that takes no compilation: a damaged file may open and
fail later. An `assert` here says what must hold of an input that was not refused.
"""

import csv
import json
import math
import random
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tomli_w
from safetensors.numpy import load_file, save_file

import qlora_jax as qlora
from qlora_jax.config.data import DataConfig
from qlora_jax.config.run import RunConfig, read_run, write_run
from qlora_jax.data.intake import read_dataset
from qlora_jax.errors import DataError
from qlora_jax.exchange.ours import describe_adapter, misfits, save_adapter
from qlora_jax.exchange.peft import describe_peft, export_peft, peft_misfits
from qlora_jax.exchange.read import read_adapter
from qlora_jax.models import abstract
from qlora_jax.nn.quantizing import quantize
from qlora_jax.nn.rope import inverse_frequencies
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf.write import write_gguf
from qlora_jax.sources.load import outline
from qlora_jax.sources.safetensors import Checkpoint
from qlora_jax.sources.source import open_source
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.metrics import MetricsLog, read_metrics
from scripts.torture import mutate
from scripts.torture.hostile_templates import template

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "qlora_jax" / "assets" / "base"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]
Damage = Callable[[Path, random.Random], None]


class Reader(NamedTuple):
    """A reader of one kind of input.

    Attributes:
      make: Writes a good input into an empty folder.
      damage: Damages it there.
      read: Reads the folder, and uses what it has read.
      heavy: Whether a case takes some hundredths of a second, so that fewer are tried.
    """

    make: Callable[[Path], None]
    damage: Damage
    read: Callable[[Path], Any]
    heavy: bool = False


def one_of(*choices: tuple[str, Damage]) -> Damage:
    """Returns what damages one of some files, named relative to the folder."""

    def damage(folder: Path, rng: random.Random) -> None:
        name, how = rng.choice(choices)
        how(folder / name, rng)

    return damage


# config.json


def _configs() -> dict[str, dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    try:
        import family_cases
    finally:
        sys.path.pop(0)
    inner = family_cases.CASES["gemma3_text"]
    packed = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head"],
    }
    return family_cases.CASES | {
        "gemma3": {"model_type": "gemma3", "text_config": inner, "eos_token_id": [1]},
        "packed": family_cases.CASES["qwen2"] | {"quantization_config": packed},
        "tables": family_cases.CASES["qwen2"]
        | {
            "quantization_config": {
                "quant_method": bitsandbytes.WITH_INT8,
                "int8_tables": ["model.embed_tokens"],
                "linears": packed,
            }
        },
    }


def _damage_config(folder: Path, rng: random.Random) -> None:
    every = json.loads((folder / "configs.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(every[rng.choice([*every])]))
    mutate.of_json(path, rng)


def _make_configs(folder: Path) -> None:
    made = _configs()
    (folder / "configs.json").write_text(json.dumps(made))
    (folder / "config.json").write_text(json.dumps(made["mistral"]))


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
    if config not in _shaped and len(_shaped) % 8 == 0:
        abstract(config)
    _shaped.add(config)


# Tokenizers and templates


def _make_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        shutil.copyfile(BASE / name, folder / name)
    settings = json.loads((BASE / "tokenizer_config.json").read_text())
    settings |= {
        "bos_token": {"content": "<s>", "lstrip": False, "special": True},
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>"],
        "chat_template": [{"name": "default", "template": CHAT}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": 512, "<b>": 513}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"unk_token": "<unk>", "pad_token": {"content": "<b>"}})
    )


def _damage_tokenizer(folder: Path, rng: random.Random) -> None:
    settings = folder / "tokenizer_config.json"
    if rng.random() < 0.5:  # added_tokens.json counts only without these
        whole = json.loads(settings.read_text())
        whole["added_tokens_decoder"] = {
            "512": {"content": "<a>", "special": True, "normalized": False},
            "0": {"content": "<unk>", "special": True},
        }
        settings.write_text(json.dumps(whole))
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    more = ("added_tokens.json", "special_tokens_map.json", "config.json")
    mutate.of_json(folder / rng.choice(names + names[:2] + more), rng)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    if tokenizer is None:
        return
    ids = (*tokenizer.stop_ids, *([tokenizer.bos_id] if tokenizer.bos_id else ()))
    assert all(type(i) is int and i >= 0 for i in ids), f"{ids} are no ids"
    tokenizer.decode(tokenizer.encode("some text <a>"))
    assert tokenizer.identity
    try:
        tokenizer.encode(tokenizer.chat(MESSAGES))
    except DataError:
        pass  # the rows are refused, with what the template says


def _damage_template(folder: Path, rng: random.Random) -> None:
    path = folder / "template.jinja"
    if rng.random() < 0.3:
        mutate.of_bytes(path, rng)
    else:
        path.write_text(template(rng))


def _read_template(folder: Path) -> None:
    path = folder / "template.jinja"
    if not path.is_file():
        return
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return
    made = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})
    _ = made.contents, made.variables
    made.render(MESSAGES, add_generation_prompt=True).encode()


# Weights


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


def _damage_safetensors(path: Path, rng: random.Random) -> None:
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
        text = mutate.json_text(mutate.mutated(state, rng)).encode(errors="replace")
        tensors[name] = np.frombuffer(text, np.uint8)
    else:
        _damage_array(tensors, name, rng)
    save_file(tensors, path)


def _damage_array(
    tensors: dict[str, np.ndarray], name: str, rng: random.Random
) -> None:
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
    from qlora_jax.sources.load import _wanted

    config = open_source(base).config
    tensors = {
        name: rng.standard_normal(shape).astype(np.float16)
        for names, _, shape in _wanted(abstract(config), hf_table(config)).values()
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


# Adapters


def _adapted() -> Any:
    model, _ = qlora.load(BASE)
    return qlora.attach(
        model,
        qlora.LoRAConfig(rank=2, targets="q_proj,v_proj", rank_pattern={"v_proj": 3}),
        key=jax.random.key(0),
    )


def _make_adapter(folder: Path) -> None:
    model = _adapted()
    _, lora, _ = qlora.split(model)
    config = qlora.LoRAConfig(
        rank=2, targets="q_proj,v_proj", rank_pattern={"v_proj": 3}
    )
    save_adapter(folder / "adapter", lora, config)


_bases: list[Any] = []


def _base() -> Any:
    if not _bases:
        _bases.append(outline(BASE).model)
    return _bases[0]


def _read_adapter(folder: Path) -> None:
    folder /= "adapter"
    describe_adapter(folder)
    misfits(folder, _base())


def _damage_arrays(folder: Path, rng: random.Random) -> None:
    files = sorted(p for p in (folder / "adapter/arrays").rglob("*") if p.is_file())
    mutate.of_bytes(rng.choice(files), rng)


def _make_peft(folder: Path) -> None:
    export_peft(folder / "peft", _adapted())


def _damage_peft(folder: Path, rng: random.Random) -> None:
    folder /= "peft"
    path = folder / "adapter_model.safetensors"
    if rng.random() < 0.6:
        settings = folder / "adapter_config.json"
        given = json.loads(settings.read_text())
        given |= {
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": given.get("alpha_pattern") or {"q_proj": 4.0},
            "modules_to_save": rng.choice((None, ["norm"])),
            "trainable_token_indices": rng.choice(
                (None, [1, 2], {"embed_tokens": [1]})
            ),
            "layers_to_transform": rng.choice((None, [0, 1])),
            "layers_pattern": rng.choice((None, "layers")),
        }
        settings.write_text(json.dumps(given))
        mutate.of_json(settings, rng)
    elif rng.random() < 0.5:
        _damage_safetensors(path, rng)
    else:
        tensors = dict(load_file(path))
        _damage_array(tensors, rng.choice([*tensors]), rng)
        save_file(tensors, path)


def _read_peft(folder: Path) -> None:
    folder /= "peft"
    describe_peft(folder)
    peft_misfits(folder, _base())


# Rows, settings, metrics

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat.jsonl": [{"messages": MESSAGES, "weight": 1}] * 3,
    "pairs.jsonl": [{"input": "a", "output": "b"}] * 3,
    "text.jsonl": [{"text": "some text"}] * 3,
    "ids.jsonl": [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}
    ],
    "sharegpt.jsonl": [
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        }
    ],
    "tools.jsonl": [{"messages": MESSAGES, "tools": [{"type": "function"}]}],
}


def _make_rows(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = ROWS["pairs.jsonl"]
    (folder / "chosen").write_text("chat.jsonl")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, ["input", "output"])
        table.writeheader()
        table.writerows(pairs)
    for name in ("pairs.jsonl", "chat.jsonl"):
        table = pyarrow.Table.from_pylist(ROWS[name])
        pyarrow.parquet.write_table(table, folder / f"{name.partition('.')[0]}.parquet")


def _damage_rows(folder: Path, rng: random.Random) -> None:
    names = [*ROWS] * 2 + ["pairs.json", "pairs.csv", "pairs.parquet", "chat.parquet"]
    name = rng.choice(names)
    how: dict[str, Damage] = {".jsonl": mutate.of_lines, ".json": mutate.of_json}
    how.get(Path(name).suffix, mutate.of_bytes)(folder / name, rng)
    (folder / "chosen").write_text(name)


_tokenizers: list[Tokenizer] = []


def _read_rows(folder: Path) -> None:
    if not _tokenizers:
        tokenizer = Tokenizer.open(BASE)
        assert tokenizer is not None
        (made := folder / "rows.jinja").write_text(CHAT)
        _tokenizers.append(tokenizer.with_chat_template(str(made)))
    path = folder / (folder / "chosen").read_text()
    made = read_dataset(str(path), _tokenizers[0], DataConfig(max_tokens=4096))
    for row in made.rows:
        assert np.isfinite(row.weights).all() and (row.weights >= 0).all()


def _make_run(folder: Path) -> None:
    write_run(folder, RunConfig(model="base", data_file=("a.jsonl",)))


def _damage_run(folder: Path, rng: random.Random) -> None:
    path = folder / "config.toml"
    if rng.random() < 0.3:
        mutate.of_bytes(path, rng)
        return
    tree = mutate.mutated(tomllib.loads(path.read_text()), rng)
    try:
        text = tomli_w.dumps(tree)
    except (TypeError, ValueError, AttributeError):  # null, or no table
        text = path.read_text() + rng.choice(
            ("x = " + "[" * 100_000, "x = " + "9" * 5000, "x = nan", "x.y = 1\nx = 2")
        )
    for name, raw in mutate.RAW.items():
        text = text.replace(f'"@raw:{name}"', raw.replace(":", "="))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _make_metrics(folder: Path) -> None:
    rows = [
        {"step": i, "loss": 2.0 / i, "grad_norm": 0.5, "learning_rate": 1e-4}
        for i in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def _read_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    for row in read_metrics(path):
        assert isinstance(row["step"], int)
        assert row.get("loss") is None or math.isfinite(row["loss"])
    MetricsLog(path, 2).close()


INDEX = "model.safetensors.index.json"
READERS: dict[str, Reader] = {
    "config": Reader(_make_configs, _damage_config, _read_config),
    "tokenizer": Reader(_make_tokenizer, _damage_tokenizer, _read_tokenizer),
    "template": Reader(
        lambda folder: (folder / "template.jinja").write_text(CHAT) and None,
        _damage_template,
        _read_template,
    ),
    "safetensors": Reader(
        _make_safetensors,
        one_of(("model.safetensors", _damage_safetensors)),
        _read_safetensors,
    ),
    "index": Reader(_make_index, one_of((INDEX, mutate.of_json)), _read_safetensors),
    "bnb": Reader(_make_bnb, _damage_bnb, _read_bnb),
    "gguf": Reader(_make_gguf, _damage_gguf, _read_gguf, heavy=True),
    "adapter": Reader(
        _make_adapter,
        one_of(("adapter/adapter.json", mutate.of_json)),
        _read_adapter,
    ),
    "arrays": Reader(
        _make_adapter,
        _damage_arrays,
        lambda folder: read_adapter(folder / "adapter"),
        heavy=True,
    ),
    "peft": Reader(_make_peft, _damage_peft, _read_peft),
    "rows": Reader(_make_rows, _damage_rows, _read_rows),
    "run": Reader(_make_run, _damage_run, read_run),
    "metrics": Reader(
        _make_metrics, one_of(("metrics.jsonl", mutate.of_lines)), _read_metrics
    ),
}
