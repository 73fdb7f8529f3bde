"""What the steps of a run add up to."""

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
"""The metrics of steps; what was not finite is None, or NaN or Inf as it was measured."""


def figures_of(rows: Rows) -> dict[str, float]:
    """Returns the mean loss of the last tenth of a run's steps, its tokens, and steps skipped.

    Losses that were not finite are left out; steps are skipped in float16 alone.
    """
    last = rows[-max(1, len(rows) // 10) :]
    losses = [row["loss"] for row in last if _is_finite(row["loss"])]
    skipped = [row["skipped"] for row in rows[-1:] if "skipped" in row]
    return {
        **({"loss": float(np.mean(losses))} if losses else {}),
        "tokens": sum((row.get("tokens") or 0.0 for row in rows), 0.0),
        **({"skipped": skipped[0]} if skipped else {}),
    }


def any_finite(rows: Rows) -> bool:
    """Whether one of some steps had a finite loss."""
    return any(_is_finite(row["loss"]) for row in rows)


def skipped_last(rows: Rows) -> int:
    """Returns how many of the last steps, up to now, were skipped in a row."""
    number = 0
    while number < len(rows):
        count = rows[-number - 1].get("skipped", 0)
        before = rows[-number - 2].get("skipped", 0) if number + 1 < len(rows) else 0
        if count <= before:
            break
        number += 1
    return number


def _is_finite(loss: float | None) -> bool:
    return loss is not None and bool(np.isfinite(loss))
