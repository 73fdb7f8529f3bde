"""What is said of a row that has no known form: what it has, and the flag that may help."""

import difflib
from collections.abc import Mapping
from typing import Any

from qlora_jax.config.objective import Rows
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
        "to learn texts: --objective dpo, orpo, simpo or kto; to train on what was chosen "
        f"alone: --data.columns {way}"
    )


def of_another_kind(row: Mapping[str, Any], rows: Rows) -> str | None:
    """Says what is wrong with a row for an objective that takes rows of a kind; None if
    nothing is."""
    pair = "chosen" in row and "rejected" in row
    if rows == "texts":
        judged = {"prompt", "completion"} <= row.keys() and isinstance(
            row.get("label"), bool
        )
        if judged:
            return (
                "is a judged row (a 'label' of true or false), whose bad answers are not to "
                "be learnt: --objective kto; to learn texts, leave out the bad ones and the "
                "field"
            )
        return None
    if rows == "teacher":
        if all(key in row for key in ("input_ids", "teacher_ids", "teacher_logprobs")):
            return None
        return (
            f"has {keys_of(row)}; --objective distill takes 'input_ids', 'teacher_ids' and "
            "'teacher_logprobs', which `qlora teach` writes"
        )
    if pair or (rows == "judged" and "label" in row):
        return None
    if rows == "judged":
        return (
            f"has {keys_of(row)}, and no 'label'; --objective kto takes an answer with a "
            "'label' of true or false (--data.columns label=...), or 'chosen' and 'rejected'"
        )
    if "label" in row:
        return (
            "is a judged row (with a 'label'), and the objective takes pairs ('chosen' and "
            "'rejected'): --objective kto"
        )
    return (
        f"has {keys_of(row)}, and the objective takes pairs: a prompt, 'chosen' and "
        "'rejected' (--data.columns chosen=... rejected=...); texts are for --objective sft"
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
