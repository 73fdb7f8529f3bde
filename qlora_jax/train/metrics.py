"""metrics.jsonl, one object a step, and what is drawn from it."""

import json
from pathlib import Path
from typing import Any

import jax


class MetricsLog:
    """Appends metrics to a file, one JSON object a line, flushed as written."""

    def __init__(self, path: Path, keep_until: int = 0):
        """Opens the file, keeping what steps up to `keep_until` wrote in `self.kept`.

        A resumed run drops the lines of steps it is going to take again.
        """
        self.kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.kept))
        partial.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Adds a row."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; [] where there is none; a line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def device_memory_bytes() -> int:
    """Returns the peak bytes in use on the first device, where it counts them.

    On CPU, which does not, the bytes of all arrays alive now.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return sum(x.nbytes for x in jax.live_arrays())
