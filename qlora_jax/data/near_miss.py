"""What is said of a row that has no known form: what it has, and the flag that may help."""

import difflib
from collections.abc import Mapping
from typing import Any

from qlora_jax.data.fields import keys_of

_ASKING = ("question", "query", "problem", "instruction", "prompt", "source", "inputs")
_ANSWERING = (
    "answer",
    "response",
    "solution",
    "completion",
    "target",
    "targets",
    "label",
    "canonical_solution",
)


def _preference(row: Mapping[str, Any]) -> str:
    """Says how to learn the chosen answers of a row that has two."""
    asked = next(
        (key for key in ("instruction", "input", *_ASKING) if key in row), None
    )
    if asked in ("instruction", "input"):
        way = "output=chosen"
    elif asked is not None:
        prompt = "" if asked == "prompt" else f"prompt={asked} "
        way = f"{prompt}completion=chosen"
    else:
        way = "text=chosen" if isinstance(row["chosen"], str) else "messages=chosen"
    return (
        "is a preference row ('chosen' and 'rejected'), which needs another objective than "
        f"to learn texts; to train on what was chosen alone: --data.columns {way}"
    )


def unknown(row: Mapping[str, Any]) -> str:
    """Says what a row has, and the flag that may make it one of a known form."""
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    text = f"has {keys_of(row)}; expected {EXPECTED}"
    lower = {str(key).lower(): key for key in row}
    ask = next((lower[key] for key in ("input", *_ASKING) if key in lower), None)
    say = next((lower[key] for key in ("output", *_ANSWERING) if key in lower), None)
    if ask is not None and say is not None:
        pairs = [("input", ask), ("output", say)]
        flags = " ".join(f"{to}={key}" for to, key in pairs if to != key)
        return f"{text}. To read them so: --data.columns {flags}"
    known = ("messages", "conversations", "text", "input", "output", "instruction")
    near = {
        name: lower[close[0]]
        for name in known
        if (close := difflib.get_close_matches(name, lower, n=1, cutoff=0.8))
        and lower[close[0]] != name
    }
    if near:
        flags = " ".join(f"{to}={key}" for to, key in near.items())
        return f"{text}. If these are meant: --data.columns {flags}"
    return text


EXPECTED = (
    "'input' and 'output', 'instruction' and 'output', 'messages', 'conversations', "
    "'prompt' and 'completion', 'text', or 'input_ids'"
)
