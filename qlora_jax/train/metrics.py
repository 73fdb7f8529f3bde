"""metrics.jsonl, one object a step, and what is drawn from it."""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from qlora_jax.disk import explained
from qlora_jax.files import write_file
from qlora_jax.inputs import check_regular

logger = logging.getLogger(__name__)

_MAX_BYTES, _MAX_LINE = 512 << 20, 1 << 20


class MetricsLog:
    """Appends metrics to a file, one JSON object a line, flushed as written.

    Attributes:
      kept: The rows that were there when it was opened.
      eval_losses: The (step, eval loss) of all rows that have one.
    """

    def __init__(self, path: Path, keep_until: int = 0, copy: Path | None = None):
        """Opens the file, keeping what steps up to `keep_until` wrote in `self.kept`.

        A resumed run drops the lines of steps it is going to take again. What is lost or
        damaged of the others is named, as a warning.

        Args:
          path: The file.
          keep_until: The last step that is kept; -1 for a new run.
          copy: The file as it was at that step, from the checkpoint; None where an older
            version wrote the checkpoint. What the file lacks comes from there.
        """
        if copy is None:
            kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
            self._lines = [json.dumps(row) + "\n" for row in kept]
            _warn_of_gaps(path, kept, keep_until)
        else:
            self._lines = copy.read_text(encoding="utf-8").splitlines(keepends=True)
            _warn_of_differences(path, self._lines)
        self.kept = [json.loads(line) for line in self._lines]
        self.eval_losses = eval_losses(self.kept)
        write_file(path, self.text)
        self._path, self._stream = path, path.open("a", encoding="utf-8")

    @property
    def text(self) -> str:
        """The whole file."""
        return "".join(self._lines)

    def write(self, **row: Any) -> None:
        """Adds a row; what is not finite is null there.

        Raises:
          OutputError: it cannot be written.
        """
        row = finite(row)
        self._lines.append(json.dumps(row, allow_nan=False) + "\n")
        self.eval_losses += eval_losses([row])
        with explained(self._path):
            self._stream.write(self._lines[-1])
            self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        with explained(self._path):  # what could not be written is tried once more
            self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; [] where there is none.

    Lines that are no object of a step are left out and named, as a warning; the last one may
    have been cut by a kill.
    """
    rows, bad = [], []
    for number, line in enumerate(_raw_lines(path), 1):
        row = _row(line)
        if row is None:
            bad.append(number)
        else:
            rows.append(row)
    if bad:
        logger.warning(
            "%s: line %s left out: no JSON object of a step (cut or damaged)",
            path,
            _spans(bad),
        )
    return rows


def eval_losses(rows: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Returns the (step, eval loss) of those rows that have one."""
    found = ((row["step"], row.get("eval_loss")) for row in rows)
    return [(step, loss) for step, loss in found if loss is not None]


def finite(value: Any) -> Any:
    """Returns a value whose numbers that are not finite are None, as JSON has no others."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file; one that is too long for a row is cut."""
    if not os.path.lexists(path):
        return
    check_regular(path, limit=_MAX_BYTES)
    with path.open("rb") as stream:
        while line := stream.readline(_MAX_LINE):
            yield line.removesuffix(b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line; None if it is no object of a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    fits = isinstance(step, int) and step >= 0 and all(map(_is_figure, row.values()))
    return finite(row) if fits else None


def _is_figure(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return value is None or isinstance(value, float)


def _warn_of_differences(path: Path, lines: list[str]) -> None:
    """Names the lines that a file has not as a checkpoint's copy has them."""
    there = list(islice(_raw_lines(path), len(lines)))
    pairs = enumerate(zip(lines, there, strict=False), 1)
    changed = [i for i, (line, other) in pairs if line.encode() != other + b"\n"]
    found = []
    if changed:
        found.append(f"was changed or damaged in line {_spans(changed)}")
    if not path.exists():
        found.append("is lost")
    elif len(there) < len(lines):
        found.append(f"lacks line {_spans(range(len(there) + 1, len(lines) + 1))}")
    if found:
        what = " and ".join(found)
        logger.warning("%s %s; it is restored from the checkpoint", path, what)


def _warn_of_gaps(path: Path, rows: list[dict[str, Any]], until: int) -> None:
    """Names the steps that a file has no metrics of."""
    have = {row["step"] for row in rows if "loss" in row}
    if lacking := [step for step in range(1, until + 1) if step not in have]:
        logger.warning(
            "%s has no metrics of step %s, and the checkpoint is of a version that kept no "
            "copy: curve and figures leave them out",
            path,
            _spans(lacking),
        )


def _spans(numbers: Iterable[int]) -> str:
    """Returns '1, 4 to 6' of 1, 4, 5, 6; at most ten parts."""
    parts = [f"{a} to {b}" if b > a else f"{a}" for a, b in _runs(numbers)]
    more = f" and {len(parts) - 10} more" if len(parts) > 10 else ""
    return ", ".join(parts[:10]) + more


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for number in numbers:
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


def device_memory_bytes() -> int:
    """Returns the peak bytes in use on the first device, where it counts them.

    On CPU, which does not, the bytes of all arrays alive now.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return sum(x.nbytes for x in jax.live_arrays())
