"""The steps of a run add up to figures, and say whether it can go on."""

from typing import Any

import numpy as np

from qlora_jax.config.train import TrainConfig

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


OVERFLOWS = 5
"""Losses in a row that are not finite, at which a float16 run ends."""


def problem_of(rows: Rows, config: TrainConfig) -> str | None:
    """Says what of the last step ends a run; None where it goes on.

    In float16 a step whose gradients overflow is skipped and the loss scale lowered. A loss
    is of the forward pass, which no scale mends: one batch may do that, not many.
    """
    loss, norm = rows[-1]["loss"], rows[-1]["grad_norm"]
    if config.compute_dtype != "float16":
        if not np.isfinite(loss):
            return f"the loss is {loss}"
        return None if np.isfinite(norm) else f"the gradient's norm is {norm}"
    if len(rows) >= OVERFLOWS and not any_finite(rows[-OVERFLOWS:]):
        return f"the loss is {loss}"
    if skipped_last(rows) >= config.max_skipped:
        return (
            f"{config.max_skipped} steps in a row were skipped, as their gradients overflowed "
            "(--train.max-skipped)"
        )
    return None


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
