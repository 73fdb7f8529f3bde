"""Seeded damage to files: to the structure of what they hold, and to their bytes."""

import copy
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAW = {
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": "9" * 5000,
    "nan": "NaN",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "exponent": "1e999",
}
"""Texts of JSON that stand for values which Python's encoder would not write."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, "", "x", "x" * 100_000, "\ud800", "a\0b", "../x"),
    *(-1, 0, 1, 2, 3, -0.5, 0.0, 0.5, 1e-30, 1e-320, 1e30, 1e308, -1e30),
    *(2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 100_000, 10**9),
    *([None], [1, 2], ["x"], [[]], [{}], [0.5] * 9, ["q_proj", 3], {"a": 1}, {"": []}),
    *({"content": 3}, {"x": {"y": None}}, "1", "true", "(", "[", "\n", "é\U0001f600"),
)
"""Values of another kind or size than any reader expects."""

_MARK, _TWICE = "@raw:", "@twice:"


def value(rng: random.Random) -> Any:
    """Draws a hostile value; a text that begins with _MARK stands for one of RAW."""
    if rng.random() < 0.15:
        return _MARK + rng.choice([*RAW])
    return copy.deepcopy(rng.choice(VALUES))


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """Draws a container in a tree and a key of it; None where there is none."""
    if not (isinstance(tree, (dict, list)) and tree):
        return None
    key = rng.choice([*tree]) if isinstance(tree, dict) else rng.randrange(len(tree))
    if rng.random() < 0.65 and (inner := _place(tree[key], rng)) is not None:
        return inner
    return tree, key


def mutated(tree: Any, rng: random.Random) -> Any:
    """Returns a copy of a JSON value in which one to three things are changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if (found := _place(tree, rng)) is None:
            return value(rng)
        _change(*found, tree, rng)
    return value(rng) if rng.random() < 0.02 else tree


def _change(container: Any, key: Any, tree: Any, rng: random.Random) -> None:
    how = rng.random()
    if how < 0.6:
        container[key] = value(rng)
    elif how < 0.7:
        del container[key]
    elif how < 0.78 and (other := _place(tree, rng)) is not None:
        container[key] = copy.deepcopy(other[0][other[1]])
    elif how < 0.84:
        container[key] = rng.choice(([container[key]], {"a": container[key]}))
    elif isinstance(container, dict) and how < 0.9:
        container[rng.choice((key + "x", "", "\ud800", key[:-1]))] = container.pop(key)
    elif isinstance(container, dict):
        container[_TWICE + key] = value(rng)
    elif isinstance(container[key], (int, float)):
        container[key] = container[key] * rng.choice((-1, 2, 1000, 0.5))
    else:
        container.append(copy.deepcopy(container[key]))


def json_text(tree: Any) -> str:
    """Returns a tree as JSON, with what stands for RAW and for doubled keys written out."""
    text = json.dumps(tree).replace(_TWICE, "")
    for name, raw in RAW.items():
        text = text.replace(f'"{_MARK}{name}"', raw)
    return text


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes of which one to three places are flipped, cut, doubled or zeroed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 8, 64))
        how = rng.random()
        if how < 0.4 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how < 0.55:
            del changed[at:]
        elif how < 0.7:
            changed[at : at + size] = bytes(size)
        elif how < 0.85:
            changed[at:at] = rng.randbytes(size)
        else:
            changed[at:at] = changed[at : at + size * 8]
    return bytes(changed)


def of_json(path: Path, rng: random.Random) -> None:
    """Damages a JSON file."""
    _in_place(path, rng, lambda text: json_text(mutated(json.loads(text), rng)))


def of_lines(path: Path, rng: random.Random) -> None:
    """Damages some lines of a file of JSON lines."""

    def change(text: str) -> str:
        lines = text.splitlines()
        for at in rng.sample(range(len(lines)), min(len(lines), rng.choice((1, 1, 2)))):
            lines[at] = json_text(mutated(json.loads(lines[at]), rng))
        return "\n".join(lines) + "\n"

    _in_place(path, rng, change)


def of_bytes(path: Path, rng: random.Random) -> None:
    """Damages a file that has no structure known here."""
    _in_place(path, rng, None)


def _in_place(
    path: Path, rng: random.Random, change: Callable[[str], str] | None
) -> None:
    """Replaces a file by a damaged one, or by what is no file."""
    data = path.read_bytes()
    if rng.random() < 0.01:
        path.unlink()
        no_file(path, rng)
        return
    if change is None or rng.random() < 0.2:
        path.write_bytes(damaged(data, rng))
        return
    path.write_text(change(data.decode()), encoding="utf-8", errors="surrogatepass")


def no_file(path: Path, rng: random.Random) -> None:
    """Puts something at a path that is no regular file."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)  # a circle
    elif kind == 4:
        path.symlink_to("missing")
    elif len(os.fsencode(path)) < 100:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
