"""Tokenized rows kept on disk, so that a run that goes on does not tokenize again.

A file is kept by a digest of all that its rows follow from: the bytes of the data, the
tokenizer, the chat template, the settings, and the sources of the modules that make them.
It is one array of ids, one of weights, and what else a row has, with a digest of its own
content: what is damaged is made again.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.config.data import DataConfig
from qlora_jax.config.objective import Rows
from qlora_jax.data.forming import Formed
from qlora_jax.data.tokenize import NO_EXTRAS, Row
from qlora_jax.inputs import read_text
from qlora_jax.text import Tokenizer, clock

logger = logging.getLogger(__name__)

VARIABLE = "QLORA_JAX_DATA_CACHE"

MAX_BYTES = 20 << 30
"""The folder holds at most so many bytes; files that were used longest ago go first."""

MIN_SECONDS = 2.0
"""Rows that took fewer seconds to make are not kept."""

_AFTER = ("max_tokens", "too_long", "packing", "eval_rows", "chat_template")
"""Settings that count after tokenizing, or that the tokenizer has."""

_MAGIC = b"qlora_jax rows 2\n"


def digest_of(
    identity: Path | str,
    tokenizer: Tokenizer,
    config: DataConfig,
    kind: Rows = "texts",
) -> str:
    """Returns a name for the rows that these give.

    Args:
      identity: The file, or what stands for its content.
      tokenizer: The tokenizer, with the chat template that counts.
      config: The settings of the data; those after tokenizing (_AFTER) do not matter here.
      kind: The kind of rows that the objective takes.
    """
    parts: dict[str, Any] = {"tokenizer": tokenizer.identity, "kind": kind}
    if isinstance(identity, Path):
        with identity.open("rb") as stream:
            parts["data"] = hashlib.file_digest(stream, "blake2b").hexdigest()
        parts["suffixes"] = identity.suffixes
    else:
        parts["data"] = identity
    settings = dataclasses.asdict(config)
    for after in _AFTER:
        del settings[after]
    template = config.prompt_template
    with contextlib.suppress(OSError, ValueError):
        if template is not None and Path(template).expanduser().is_file():
            settings["prompt_template"] = read_text(Path(template).expanduser())
    parts["settings"] = settings
    # Some templates write the date.
    if any("strftime_now" in text for text in tokenizer.chat_templates.values()):
        kept = clock.stopped()
        parts["date"] = (kept or datetime.date.today()).isoformat()[:10]
    parts["versions"] = {
        name: metadata.version(name) for name in ("tokenizers", "jinja2")
    }
    parts["sources"] = _sources()
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sources() -> str:
    digest = hashlib.blake2b()
    here = Path(__file__).parent
    for file in [
        *sorted(here.glob("*.py")),
        *sorted((here.parent / "text").glob("*.py")),
    ]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write(folder: Path, name: str, formed: Formed) -> None:
    """Keeps rows without problems; a folder that cannot be written to is named, no more."""
    arrays = {"places": np.array(formed.places, np.int64), **_arrays(formed.rows)}
    others = [row.other for row in formed.rows if row.other is not None]
    if others:
        arrays |= {f"other.{name}": x for name, x in _arrays(others).items()}
    head = {
        "arrays": {
            key: [array.dtype.str, array.shape] for key, array in arrays.items()
        },
        "read": formed.read,
        "lines": formed.lines,
        **{key: dict(getattr(formed, key)) for key in ("forms", "unused", "unread")},
    }
    _write(
        folder, name, [json.dumps(head).encode() + b"\n", *map(_bytes, arrays.values())]
    )


def write_values(folder: Path, name: str, values: np.ndarray) -> None:
    """Keeps a float32 number a row; a folder that cannot be written to is named, no more."""
    _write(folder, name, [_bytes(values.astype(np.float32))])


def read_values(folder: Path, name: str) -> np.ndarray | None:
    """Returns kept numbers; None where there are none, or they are damaged."""
    found = _read(folder / name)
    return None if found is None else np.frombuffer(found[0], np.float32, -1, found[1])


def _bytes(array: np.ndarray) -> bytes:
    return array.tobytes()


def _write(folder: Path, name: str, parts: Sequence[bytes]) -> None:
    digest = hashlib.blake2b()
    for part in parts:
        digest.update(part)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=folder, prefix="writing-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.writelines([_MAGIC, digest.digest(), *parts])
            os.replace(beside, folder / name)
        except BaseException:
            os.unlink(beside)
            raise
        _make_room(folder, name)
    except OSError as error:
        logger.warning(
            "tokenized rows are not kept, so the next run tokenizes again: %s. Name another "
            "folder in %s, or let it say off",
            error,
            VARIABLE,
        )


def read(folder: Path, name: str) -> Formed | None:
    """Returns kept rows; None where there are none, or they are damaged."""
    found = _read(folder / name)
    if found is None:
        return None
    data, start = found
    end = data.index(b"\n", start) + 1
    head, at, arrays = json.loads(data[start:end]), end, {}
    for key, (dtype, shape) in head["arrays"].items():
        arrays[key] = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        at += arrays[key].nbytes
    counts = {key: Counter(head[key]) for key in ("forms", "unused", "unread")}
    rows, others = _rows(arrays), _rows(arrays, "other.")
    if others:
        rows = [
            row._replace(other=other) for row, other in zip(rows, others, strict=True)
        ]
    return Formed(
        rows,
        arrays["places"].tolist(),
        head["read"],
        **counts,
        problems=[],
        lines=head["lines"],
    )


def _read(path: Path) -> tuple[bytes, int] | None:
    """Returns a kept file, and where its content begins; None for none, or a damaged one."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    start = len(_MAGIC) + hashlib.blake2b().digest_size
    digest = hashlib.blake2b(memoryview(data)[start:]).digest()
    if data[:start] != _MAGIC + digest:
        logger.warning("%s is damaged; what it kept is made again", path)
        return None
    return data, start


def _arrays(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Returns rows, without those beside them, as arrays."""
    answers = [row.answer.encode(errors="surrogatepass") for row in rows]
    arrays = {
        "lengths": np.array([len(row.tokens) for row in rows], np.int32),
        "tokens": np.concatenate([row.tokens for row in rows]),
        "weights": np.concatenate([row.weights for row in rows]),
        "prompts": np.array([row.prompt for row in rows], np.int32),
        "chat": np.array([row.chat for row in rows], np.uint8),
        "answers": np.frombuffer(b"".join(answers), np.uint8),
        "answer_lengths": np.array([len(answer) for answer in answers], np.int32),
    }
    for name, value in rows[0].extras.items():
        each = [row.extras[name] for row in rows]
        one = "row" if np.ndim(value) == 0 else "tokens"
        joined = np.array(each) if one == "row" else np.concatenate(each)
        arrays[f"of_{one}.{name}"] = joined
    return arrays


def _rows(every: dict[str, np.ndarray], prefix: str = "") -> list[Row]:
    if f"{prefix}lengths" not in every:
        return []
    arrays = {
        key.removeprefix(prefix): x
        for key, x in every.items()
        if key.startswith(prefix)
    }
    ends, answers = _ends(arrays["lengths"]), arrays["answers"].tobytes()
    by_row, by_token = (
        {k.removeprefix(of): x for k, x in arrays.items() if k.startswith(of)}
        for of in ("of_row.", "of_tokens.")
    )
    answer_ends = _ends(arrays["answer_lengths"])
    tokens, weights = arrays["tokens"], arrays["weights"]
    return [
        Row(
            tokens[start:end],
            weights[start:end],
            prompt,
            answers[first:last].decode(errors="surrogatepass"),
            chat=bool(chat),
            extras={
                **{name: x[i] for name, x in by_row.items()},
                **{name: x[start:end] for name, x in by_token.items()},
            }
            if by_row or by_token
            else NO_EXTRAS,
        )
        for i, ((start, end), prompt, (first, last), chat) in enumerate(
            zip(
                *(ends, arrays["prompts"].tolist(), answer_ends, arrays["chat"]),
                strict=True,
            )
        )
    ]


def _ends(lengths: np.ndarray) -> Sequence[tuple[int, int]]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


def _make_room(folder: Path, name: str) -> None:
    """Removes the files used longest ago, and what was left half written a day ago."""
    kept, now = [], time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if re.fullmatch("[0-9a-f]{32}", path.name):
                kept.append((status.st_mtime, status.st_size, path))
            elif path.name.startswith("writing-") and now - status.st_mtime > 86400:
                path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total > MAX_BYTES and path.name != name:
            path.unlink(missing_ok=True)
            total -= size
