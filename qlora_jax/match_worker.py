"""A process that matches regular expressions for another: see matching.py.

It imports the standard library alone, and is started as a file: `python -I -S FILE`. It ends
itself, by a signal, when a match has taken too long.
"""

import json
import re
import signal
import sys
from typing import Any

MAX_SECONDS = 5.0
"""Time of the processor that one match may take, beside what its text's length allows."""

CHARACTERS_PER_SECOND = 100_000
"""Characters of a text for which a match gets another second."""

MAX_TOTAL_SECONDS = 10.0
"""Time beside that which a process may take for all matches it is asked for."""

Groups = list[str | None]
"""The text of a match, and of each of its groups."""


def found(how: str, pattern: str, text: str) -> Groups | None:
    """Matches: `how` is "fullmatch" or "match", or "last" for the last match in the text."""
    compiled = re.compile(pattern)
    if how == "last":
        last = None
        for one in compiled.finditer(text):
            last = one
    else:
        last = getattr(compiled, how)(text)
    return None if last is None else [last[0], *last.groups()]


def serve(lines: Any, answers: Any, seconds: float = MAX_TOTAL_SECONDS) -> None:
    """Matches what is asked for, a line of JSON each, and ends by a signal when it is late."""
    spare = seconds
    for line in lines:
        how, pattern, text = json.loads(line)
        more = len(text) / CHARACTERS_PER_SECOND
        allowed = max(0.05, min(MAX_SECONDS, spare)) + more  # 0 would be no limit
        signal.setitimer(signal.ITIMER_VIRTUAL, allowed)
        groups = found(how, pattern, text)
        left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        spare -= max(0.0, allowed - left - more - 0.001)
        answers.write(json.dumps(groups) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # pyright: ignore
    serve(sys.stdin, sys.stdout, *map(float, sys.argv[1:]))
