"""Fits the coefficients of qlora_jax/budget/estimate.py to what XLA assigned, and judges it.

    python -m scripts.make.fit_memory [-v]        # prints the coefficients
    python -m scripts.make.fit_memory --held-out  # writes results/memory_held_out.jsonl

Reads scripts/results/memory_{h200,cpu}.jsonl (scripts/bench/memory.py writes them). For
each platform, with and without recomputed layers, a linear program finds the coefficients,
none negative, whose largest error, relative to a step's all, is least. Which of layer and
loss is the peak of a setup follows from the last coefficients; a few rounds settle it.

How well such a fit describes the rows that it was made of says little. `--held-out` leaves
each model out in turn, fits the others, and records those coefficients and what they
predict of the model that they have not seen. tests/budget/test_memory.py makes the same
predictions from that record.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import linprog

from qlora_jax.budget.estimate import (
    FITTED,
    Platform,
    _adds_up,
    _kept,
    _resident,
    estimate,
    features,
)
from scripts.bench import harness
from scripts.bench.memory import setup_of

RESULTS = harness.ROOT / "scripts" / "results"
HELD_OUT = RESULTS / "memory_held_out.jsonl"
TARGETS: dict[Platform, str] = {"gpu": "h200", "cpu": "cpu"}
ROUNDS = 20

Row = dict[str, Any]


def recorded(platform: Platform) -> list[Row]:
    """Reads what XLA assigned to each setup of the grid."""
    return harness.read_rows(RESULTS / f"memory_{TARGETS[platform]}.jsonl")


def xla_bytes(row: Row) -> int:
    """Returns the device memory of a recorded step at its peak."""
    return row["xla"]["arguments"] + row["xla"]["temporaries"]


def rows_of(platform: Platform) -> list[Row]:
    """Returns each recorded setup's features, and what they have to explain."""
    rows = []
    for row in recorded(platform):
        setup = setup_of(row["model"], row["changes"])
        parts = _resident(setup)
        xla = xla_bytes(row)
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


def sums_of(rows: list[Row], found: dict[str, float]) -> list[dict[str, float]]:
    """Returns what coefficients say is alive, for each row, when each of the two runs."""
    return [
        {
            moment: row["start"][moment]
            + sum(found[k[1]] * v for k, v in row["features"].items() if k[0] == moment)
            for moment in ("layer", "loss")
        }
        for row in rows
    ]


def largest_error(rows: list[Row], sums: list[dict[str, float]]) -> float:
    """Returns the largest error of some sums, relative to a step's all."""
    return max(
        abs(max(s.values()) - row["rest"]) / row["xla"]
        for s, row in zip(sums, rows, strict=True)
    )


def fit(rows: list[Row]) -> tuple[dict[str, float], float]:
    """Returns ({name: coefficient}, the largest relative error)."""
    starts = (
        ["layer" for _ in rows],
        ["loss" if _starts_as_loss(row) else "layer" for row in rows],
    )
    return min((_fit_from(peak, rows) for peak in starts), key=lambda found: found[1])


def _fit_from(peak: list[str], rows: list[Row]) -> tuple[dict[str, float], float]:
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
        sums = sums_of(rows, found)
        error = largest_error(rows, sums)
        if error < best[1]:
            best = found, error
        # Where the loss explains more than a layer's backward, it is the peak.
        peak = ["loss" if s["loss"] > s["layer"] else "layer" for s in sums]
    return best


def _starts_as_loss(row: Row) -> bool:
    """Guesses from what the first fit of a layer's activations was: 5 times the widest."""
    sizes = row["features"]
    layer = row["start"]["layer"] + 5 * sizes["layer", "wide"]
    return sizes["loss", "logits"] / 2 > layer


def rounded(found: dict[str, float]) -> dict[str, float]:
    """Returns coefficients as estimate.py writes them, without those that are nothing."""
    return {name: round(v, 3) for name, v in found.items() if round(v, 3)}


def held_out(platform: Platform) -> Iterator[Row]:
    """Yields, for each model, a fit of the others and what it predicts of that model."""
    rows = rows_of(platform)
    for recomputes in (True, False):
        mine = [row for row in rows if row["recomputes"] == recomputes]
        for model in sorted({row["row"]["model"] for row in mine}):
            others = [row for row in mine if row["row"]["model"] != model]
            found, error = fit(others)
            coefficients = rounded(found)
            fitted = {**FITTED, (platform, recomputes): coefficients}
            predictions = []
            for row in (row["row"] for row in mine if row["row"]["model"] == model):
                setup = setup_of(model, row["changes"])
                predicted = estimate(setup, platform, fitted).device_bytes
                predictions.append(
                    {
                        "changes": row["changes"],
                        "predicted_bytes": predicted,
                        "xla_bytes": xla_bytes(row),
                    }
                )
            yield {
                "platform": platform,
                "recomputes": recomputes,
                "left_out": model,
                "fitted_rows": len(others),
                "fitted_error": round(error, 5),
                "coefficients": coefficients,
                "predictions": predictions,
            }


def errors_of(line: Row) -> list[float]:
    """Returns the errors of a line's predictions, below zero where they are too small."""
    return [p["predicted_bytes"] / p["xla_bytes"] - 1 for p in line["predictions"]]


def summary(errors: list[float]) -> str:
    """Says errors in words."""
    sizes = sorted(abs(error) for error in errors)
    return (
        f"{len(errors)} predictions: {sizes[len(sizes) // 2]:.1%} typically (median), "
        f"{min(errors):+.1%} to {max(errors):+.1%}"
    )


def write_held_out() -> None:
    """Writes the record of models that were left out, and prints what it says."""
    lines = [line for platform in TARGETS for line in held_out(platform)]
    HELD_OUT.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for platform in TARGETS:
        mine = [line for line in lines if line["platform"] == platform]
        for line in mine:
            print(f"{platform} without {line['left_out']}: {summary(errors_of(line))}")
        every = [error for line in mine for error in errors_of(line)]
        print(f"{platform}, all: {summary(every)}")


def print_fit(verbose: bool) -> None:
    """Fits all rows and prints the coefficients, and each row's error where asked."""
    for platform in TARGETS:
        rows = rows_of(platform)
        for recomputes in (True, False):
            mine = [row for row in rows if row["recomputes"] == recomputes]
            found, error = fit(mine)
            print(
                f"{(platform, recomputes)}: {rounded(found)},  # {error:.1%} of {len(mine)}"
            )
            for row, s in (
                zip(mine, sums_of(mine, found), strict=True) if verbose else ()
            ):
                off = (max(s.values()) - row["rest"]) / row["xla"]
                where = max(s, key=s.__getitem__)
                print(
                    f"  {off:+.1%} {where} {row['row']['model']} {row['row']['changes']}"
                )


def main() -> None:
    """Fits and prints, or writes the record of models that were left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", action="store_true", help="leave each model out")
    parser.add_argument("-v", "--verbose", action="store_true", help="each row's error")
    args = parser.parse_args()
    write_held_out() if args.held_out else print_fit(args.verbose)


if __name__ == "__main__":
    main()
