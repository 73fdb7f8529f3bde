"""Readers of tokenizers, chat templates and rows.

What is read is also used, as far as that takes no compilation: a damaged file may open and
fail later. An `assert` here says what must hold of an input that was not refused.
"""

import bz2
import csv
import gzip
import json
import lzma
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.config.data import DataConfig
from qlora_jax.data.intake import read_dataset
from qlora_jax.errors import DataError
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.tokenizer import Tokenizer
from scripts.torture import mutate
from scripts.torture.hostile_templates import template
from scripts.torture.reader import BASE, CHAT, MESSAGES, Damage, Reader


def make_tokenizer(folder: Path) -> None:
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


def _make_template(folder: Path) -> None:
    (folder / "template.jinja").write_text(CHAT)


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


_PIECES = (
    "a",
    "b",
    r"\s",
    r"\p{L}",
    ".",
    "[^b]",
    "(?i:a)",
    "",
    "a|b",
    r"\b",
    "ß",
    "\0",
)
_REPEATS = ("", "*", "+", "?", "{2,}", "{0,50}", "{1000}", "*?", "++", "{9999999}")


def pattern(rng: random.Random, depth: int = 3) -> str:
    """Draws a regular expression, one that takes long more often than others do."""
    made = rng.choice(_PIECES)
    for _ in range(rng.randrange(4) if depth else 0):
        made += f"({pattern(rng, depth - 1)}){rng.choice(_REPEATS)}"
    return made + rng.choice(_REPEATS) * (rng.random() < 0.5)


def _damage_patterns(folder: Path, rng: random.Random) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    given = {"Regex": pattern(rng) * rng.choice((1, 1, 1, 2, 500))}
    split = {"type": "Split", "behavior": "Isolated", "invert": rng.random() < 0.2}
    replace = {"type": "Replace", "content": rng.choice(("", "b", "aa" * 99))}
    where = rng.choice(("pre_tokenizer", "normalizer", "decoder"))
    whole[where] = (split if where == "pre_tokenizer" else replace) | {"pattern": given}
    path.write_text(json.dumps(whole))


def _read_patterns(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None
    for text in ("a" * 3000, "ab a\n" * 300, "Ünïcode ß" * 30):
        tokenizer.decode(tokenizer.encode(text)[:100])


def _make_packed(folder: Path) -> None:
    _make_rows(folder)
    lines = (folder / "pairs.jsonl").read_bytes()
    for name, pack in _PACKS.items():
        (folder / f"pairs.jsonl{name}").write_bytes(pack(lines))


def _damage_packed(folder: Path, rng: random.Random) -> None:
    import pyarrow
    import pyarrow.parquet

    name = rng.choice((*_PACKS, "parquet"))
    path = folder / (f"pairs.jsonl{name}" if name in _PACKS else "pairs.parquet")
    (folder / "chosen").write_text(path.name)
    if rng.random() < 0.4:
        mutate.of_bytes(path, rng)
    elif name in _PACKS:
        size = rng.choice((1, 10**3, 10**6, 3 * 10**7))
        text = b'{"text": "' + b"a" * size + b'"}' + b"\n" * rng.choice((0, 1, size))
        path.write_bytes(_PACKS[name](text))
    else:
        count = rng.choice((1, 10**3, 10**6))
        kinds = (
            pyarrow.nulls(count),
            pyarrow.array([rng.choice(("a", "b" * 10**6))]).take(
                pyarrow.array([0] * min(count, 10**3))
            ),
            pyarrow.array([{"role": "user", "content": None}] * min(count, 10**3)),
            pyarrow.array([[0] * count]),
        )
        column = rng.choice(kinds)
        names = rng.choice((("text",), ("messages",), ("input_ids", "labels"), ("",)))
        table = pyarrow.Table.from_arrays([column] * len(names), [*names])
        pyarrow.parquet.write_table(
            table, path, compression=rng.choice(("zstd", "none"))
        )


_PACKS: dict[str, Any] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

READERS: dict[str, Reader] = {
    "tokenizer": Reader(make_tokenizer, _damage_tokenizer, _read_tokenizer),
    "template": Reader(
        _make_template,
        _damage_template,
        _read_template,
    ),
    "rows": Reader(_make_rows, _damage_rows, _read_rows),
    "patterns": Reader(make_tokenizer, _damage_patterns, _read_patterns),
    "packed": Reader(_make_packed, _damage_packed, _read_rows, heavy=True),
}
