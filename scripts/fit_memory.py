"""Fits the coefficients of qlora_jax/memory.py to what XLA assigned, and prints them.

    python scripts/fit_memory.py [-v]

Reads scripts/results/memory_*.jsonl (scripts/measure_memory.py writes them). For each
platform, with and without recomputed layers, a linear program finds the coefficients, none
negative, whose largest error, relative to a step's all, is least. Which of layer and loss is
the peak of a setup follows from the last coefficients; a few rounds settle it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measure_memory import setup_of
from scipy.optimize import linprog

from qlora_jax.memory import _adds_up, _kept, _resident, features

ROUNDS = 20


def rows_of(platform: str) -> list[dict[str, Any]]:
    """Returns each recorded setup's features, and what they have to explain."""
    target = {"gpu": "h200", "cpu": "cpu"}[platform]
    path = Path(__file__).parent / f"results/memory_{target}.jsonl"
    rows = []
    for row in map(json.loads, path.read_text().splitlines()):
        setup = setup_of(row["model"], row["changes"])
        parts = _resident(setup)
        xla = row["xla"]["arguments"] + row["xla"]["temporaries"]
        away = set()
        if platform == "gpu":
            away = {"layers"} if setup.stream else set()
            away |= {"optimizer"} if setup.offload else set()
        known = sum(size for name, size in parts.items() if name not in away)
        rows.append(
            {
                "row": row,
                "recomputes": setup.checkpoint != "none",
                "xla": xla,
                "rest": xla - known - _kept(setup, platform),
                "start": {
                    "layer": parts["adapter"],
                    "loss": parts["adapter"] if _adds_up(setup) else 0,
                },
                "features": features(setup, platform, parts),
            }
        )
    return rows


def sums_of(
    rows: list[dict[str, Any]], found: dict[str, float]
) -> list[dict[str, float]]:
    """Returns what coefficients say is alive, for each row, when each of the two runs."""
    return [
        {
            moment: row["start"][moment]
            + sum(found[k[1]] * v for k, v in row["features"].items() if k[0] == moment)
            for moment in ("layer", "loss")
        }
        for row in rows
    ]


def fit(rows: list[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Returns ({name: coefficient}, the largest relative error)."""
    starts = (
        ["layer" for _ in rows],
        ["loss" if _starts_as_loss(row) else "layer" for row in rows],
    )
    return min((_fit_from(peak, rows) for peak in starts), key=lambda found: found[1])


def _fit_from(
    peak: list[str], rows: list[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    names = sorted({name for row in rows for _, name in row["features"]})
    best: tuple[dict[str, float], float] = ({}, float("inf"))
    for _ in range(ROUNDS):
        left, right = [], []
        for row, moment in zip(rows, peak, strict=True):
            here = {k[1]: v for k, v in row["features"].items() if k[0] == moment}
            line = np.array([here.get(name, 0.0) for name in names]) / row["xla"]
            want = (row["rest"] - row["start"][moment]) / row["xla"]
            left += [[*line, -1.0], [*-line, -1.0]]
            right += [want, -want]
        cost = np.zeros(len(names) + 1)
        cost[-1] = 1.0
        solved = linprog(cost, A_ub=left, b_ub=right).x
        found = dict(zip(names, solved[:-1].tolist(), strict=True))
        sums = [
            {
                moment: row["start"][moment]
                + sum(
                    found[k[1]] * v
                    for k, v in row["features"].items()
                    if k[0] == moment
                )
                for moment in ("layer", "loss")
            }
            for row in rows
        ]
        errors = [
            abs(max(s.values()) - row["rest"]) / row["xla"]
            for s, row in zip(sums, rows, strict=True)
        ]
        if max(errors) < best[1]:
            best = found, max(errors)
        # Where the loss explains more than a layer's backward, it is the peak.
        peak = ["loss" if s["loss"] > s["layer"] else "layer" for s in sums]
    return best


def _starts_as_loss(row: dict[str, Any]) -> bool:
    """Guesses from what the first fit of a layer's activations was: 5 times the widest."""
    sizes = row["features"]
    layer = row["start"]["layer"] + 5 * sizes["layer", "wide"]
    return sizes["loss", "logits"] / 2 > layer


def main() -> None:
    """Fits and prints."""
    for platform in ("gpu", "cpu"):
        rows = rows_of(platform)
        for recomputes in (True, False):
            mine = [row for row in rows if row["recomputes"] == recomputes]
            found, error = fit(mine)
            kept = {k: round(v, 3) for k, v in found.items() if round(v, 3)}
            print(f"{(platform, recomputes)}: {kept},  # {error:.1%} of {len(mine)}")
            if "-v" in sys.argv:
                for row, s in zip(mine, sums_of(mine, found), strict=True):
                    off = (max(s.values()) - row["rest"]) / row["xla"]
                    where = max(s, key=s.__getitem__)
                    print(
                        f"  {off:+.1%} {where} {row['row']['model']} {row['row']['changes']}"
                    )


if __name__ == "__main__":
    main()
