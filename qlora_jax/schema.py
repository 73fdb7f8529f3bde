"""Kinds of values: what a field of a file may hold, said by a table and checked at once.

    KINDS = {"hidden_size": whole(1, 2**20), "rope_theta": either(NULL, number(1, 1e12))}
    problems = misfits(values, KINDS)

Fields that a table does not name are left alone. A bool is no number here, and neither NaN nor
an infinity fits any kind of number.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
_SHOWN.maxlevel = 2


class Kind(NamedTuple):
    """A kind of values.

    Attributes:
      says: What it is, after "expected": "a whole number from 1 to 8".
      fits: Whether a value is of it.
      parts: What is in a value of its type: (how its name goes on, it, its kind) of each.
      choices: The kinds that it is one of.
    """

    says: str
    fits: Callable[[Any], bool]
    parts: "Callable[[Any], Iterable[tuple[str, Any, Kind]]]" = lambda _: ()
    choices: "tuple[Kind, ...]" = ()


NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def whole(low: int, high: int) -> Kind:
    """Returns the kind of whole numbers from `low` to `high`, both included."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float, high: float, *, least: bool = False) -> Kind:
    """Returns the kind of finite numbers above `low`, up to `high`.

    Args:
      low: What they are above.
      high: The largest.
      least: Whether `low` is one of them.
    """

    def fits(value: Any) -> bool:
        real = type(value) in (int, float)
        return real and (low < value <= high or (least and value == low))

    begins = f"from {low:g} to" if least else f"above {low:g}, at most"
    return Kind(f"a number {begins} {high:g}", fits)


FINITE = Kind(
    "a finite number",
    lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
)


def listed(kind: Kind, most: int = 1_000_000) -> Kind:
    """Returns the kind of lists of values of a kind, at most so many."""

    def parts(value: Any) -> Iterable[tuple[str, Any, Kind]]:
        if isinstance(value, list) and len(value) <= most:
            yield from ((f"[{i}]", one, kind) for i, one in enumerate(value))

    return Kind(
        f"a list of at most {most}, each {kind.says}",
        lambda value: (
            isinstance(value, list)
            and len(value) <= most
            and all(map(kind.fits, value))
        ),
        parts,
    )


def mapped(kind: Kind, most: int = 1_000_000) -> Kind:
    """Returns the kind of objects whose values are of a kind, at most so many."""

    def parts(value: Any) -> Iterable[tuple[str, Any, Kind]]:
        if isinstance(value, dict) and len(value) <= most:
            yield from ((f".{name:.80}", one, kind) for name, one in value.items())

    return Kind(
        f"an object of at most {most}, each value {kind.says}",
        lambda value: (
            isinstance(value, dict)
            and len(value) <= most
            and all(map(kind.fits, value.values()))
        ),
        parts,
    )


def shaped(kinds: Mapping[str, Kind], needed: tuple[str, ...] = ()) -> Kind:
    """Returns the kind of objects whose fields are of some kinds.

    Args:
      kinds: The kind of each field that is checked.
      needed: Fields that have to be there, and not null.
    """

    def fits(value: Any) -> bool:
        return isinstance(value, dict) and not misfits(value, kinds, needed)

    def parts(value: Any) -> Iterable[tuple[str, Any, Kind]]:
        if isinstance(value, dict):
            for name, kind in kinds.items():
                if name in value or name in needed:
                    yield f".{name}", value.get(name), kind

    named = ", ".join(f"{name} ({kind.says})" for name, kind in kinds.items())
    return Kind(f"an object with {named}", fits, parts)


def either(*kinds: Kind) -> Kind:
    """Returns the kind of values that are of one of some kinds."""
    return Kind(
        " or ".join(kind.says for kind in kinds),
        lambda value: any(kind.fits(value) for kind in kinds),
        choices=kinds,
    )


def misfits(
    values: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    needed: tuple[str, ...] = (),
    within: str = "",
) -> list[str]:
    """Returns a sentence for each field that is missing, or of another kind.

    Args:
      values: The fields of an object.
      kinds: The kind of each field that is checked.
      needed: Fields that have to be there, and not null.
      within: What stands before the names of fields: "rope_scaling.".
    """
    missing = [name for name in needed if values.get(name) is None]
    return [f"{within}{name} is missing" for name in missing] + [
        _misfit(within + name, values[name], kind)
        for name, kind in kinds.items()
        if name in values and name not in missing and not kind.fits(values[name])
    ]


def _misfit(name: str, value: Any, kind: Kind) -> str:
    """Says what is wrong with a value, or with the first part of it that is."""
    for one in kind.choices or (kind,):
        for more, part, inner in one.parts(value):
            if not inner.fits(part):
                return _misfit(name + more, part, inner)
    return f"{name} is {shown(value)}, expected {kind.says}"


def shown(value: Any) -> str:
    """Returns a value for a message, shortened."""
    return "null" if value is None else _SHOWN.repr(value)


def pattern_problem(text: str) -> str | None:
    """Says why a text is no regular expression that can be matched; None where it is one.

    A group that is repeated without end and holds a repeat or a choice can be matched in so
    many ways that trying them takes for ever: `(a+)+b`, `(a|a)*b`.
    """
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    groups: list[bool] = [False]  # whether each open group has a repeat or a choice
    for token in _TOKENS.finditer(text):
        part = token[0]
        if part == "(":
            groups.append(False)
        elif part.startswith(")"):
            varies = groups.pop() if len(groups) > 1 else False
            if varies and len(part) > 1:
                return (
                    f"{part[1:]!r} repeats a group that has a repeat or a choice itself"
                )
            groups[-1] |= varies or len(part) > 1
        elif part == "|" or part[0] in "*+{":
            groups[-1] = True
    return None


_ENDLESS = r"[*+]|\{\d*,\}"
_TOKENS = re.compile(
    rf"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\)(?:{_ENDLESS})?|\(|\||{_ENDLESS}", re.DOTALL
)
"""What of a regular expression matters here; escapes and sets of characters are one piece."""
