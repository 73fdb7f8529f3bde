r"""The answer in a longer text, and when two answers are the same.

A model that reasons says more than its answer, and its reasoning need not be the expected
one. A pattern takes the answer out of both, and numbers compare as numbers:

    gsm8k       the rest of the line after the first "####"
    boxed       what the last \boxed{...} holds, braces balanced
    any regex   its last match: the first group, or all of it where it has none; a search that
                takes longer than some seconds of work is an error
"""

import re
from collections.abc import Callable
from decimal import Decimal

from qlora_jax import matching
from qlora_jax.errors import ConfigError

Extract = Callable[[str], str | None]
"""Returns the answer in a text; None where it has none."""

_MARK = "####"
_BRACE = re.compile(r"(?P<boxed>\\boxed\s*\{)|\\[{}]|[{}]")
"""What opens or closes; a brace that a backslash stands before is a letter."""

_NUMBER = re.compile(
    r"(?P<sign>[+\-\u2212]?)\s*(?:\\?\$\s*)?(?P<sign2>[+\-\u2212]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
)


def extractor(pattern: str) -> Extract:
    """Returns what takes an answer out of a text.

    Args:
      pattern: "gsm8k", "boxed", or a regular expression.

    Raises:
      ConfigError: it is no regular expression.
    """
    if pattern in _NAMED:
        return _NAMED[pattern]
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"--answer-pattern {pattern!r} is no regular expression: {error}; expected "
            f"one, or {' or '.join(_NAMED)}"
        ) from None
    return lambda text: _last_match(pattern, text, 1 if groups else 0)


def same_answer(expected: str, given: str) -> bool:
    """Returns whether two answers are equal, as numbers where both are.

    Dollar signs, commas between thousands, a plus and a period at the end change no number:
    "$1,000.00." is "1000". Fractions, percentages and units stay text.
    """
    first, second = _number(expected), _number(given)
    if first is not None and second is not None:
        return first == second
    return expected.strip() == given.strip()


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip().removesuffix(".").rstrip())
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return -value if (match["sign"] or match["sign2"]) in ("-", "\u2212") else value


def _last_match(pattern: str, text: str, group: int) -> str | None:
    last = matching.last(pattern, text)
    return None if last is None else last[group]


def _after_mark(text: str) -> str | None:
    # The first one, as gsm8k's own scoring has it: what a model goes on to say after its
    # answer, often the next question, does not count.
    at = text.find(_MARK)
    while at >= 0:
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if rest := text[at + len(_MARK) : end].lstrip(" \t").rstrip():
            return rest
        at = text.find(_MARK, end)
    return None


def _boxed(text: str) -> str | None:
    opened: list[int | None] = []  # where what a box holds begins; None for a brace
    last, answer = -1, None
    for found in _BRACE.finditer(text):
        if found["boxed"]:
            opened.append(found.end())
        elif found[0] == "{":
            opened.append(None)
        elif found[0] == "}" and opened:
            begins = opened.pop()
            if begins is not None and begins > last:
                last, answer = begins, text[begins : found.start()].strip()
    return answer


_NAMED: dict[str, Extract] = {"gsm8k": _after_mark, "boxed": _boxed}
