"""Prints what gpu/suite.py found, as Markdown tables."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

IDENTITY = ("section", "what", "direction", "m", "n", "k", "dtype", "codebook", "exact")
IDENTITY += ("rank", "check", "batch", "seq")
OURS = ("ours", "decode", "hopper", "ampere", "two_pass", "xla")
RIVALS = ("dense", "bitsandbytes")
NAMES = {"dense": "cuBLAS bf16"}
BITS_A_WEIGHT = 4.127

GOALS = (
    ((1, 8), "dense", 3.0),
    ((1, 8), "bitsandbytes", 1.0),
    ((16, 64), "dense", 2.5),
    ((128, 1024), "two_pass", 1.3),
    ((128, 1024), "bitsandbytes", 1.3),
    ((4096, 16384), "dense", 0.95),
)
"""Tokens from and to, rival, and how many times as fast as it the choice shall be."""
BANDWIDTH_GOAL = 0.75  # of the copy's, at 1 to 8 tokens


def latest(rows: list[Row]) -> list[Row]:
    """Returns the last row of each task, in order of the first."""
    found: dict[tuple, Row] = {}
    for row in rows:
        if row.get("section") not in (None, "run"):
            found[tuple(row.get(key) for key in IDENTITY)] = row
    return list(found.values())


def failed_numerics(rows: list[Row]) -> list[Row]:
    """Returns the numerics that did not pass, or did not come to an end."""
    return [
        row
        for row in latest(rows)
        if row["section"] == "numerics"
        and ("failed" in row or row.get("passed") is False)
    ]


def report(rows: list[Row]) -> Iterator[str]:
    """Yields the lines of a report on a file's rows, of this suite or an older one."""
    for row in rows:
        if row.get("section") in (None, "run"):
            told = ("what", "date", "commit", "device", "versions", "note")
            yield "; ".join(f"{row[key]}" for key in told if row.get(key))
    rows = latest(rows)
    yield from failures(rows)
    yield from numerics(rows)
    ceiling = ceilings(rows)
    if ceiling:
        yield "\n## Ceilings\n"
        if "copy" in ceiling:
            yield f"copy (x + 1 over 4 GiB): {ceiling['copy'] / 1e12:.2f} TB/s"
        if "product" in ceiling:
            yield f"bf16 product (8192^3): {ceiling['product'] / 1e12:.0f} TFLOP/s"
    yield from sweep(rows, ceiling)
    yield from goals(rows, ceiling)
    yield from others(rows)


def failures(rows: list[Row]) -> Iterator[str]:
    """Tasks without figures."""
    found = [row for row in rows if "failed" in row]
    if found:
        yield "\n## Failed\n"
    for row in found:
        yield f"- {name_of(row)}: {row['failed']}"


def name_of(row: Row) -> str:
    return " ".join(f"{key}={row[key]}" for key in IDENTITY if row.get(key))


def numerics(rows: list[Row]) -> Iterator[str]:
    """A line for each implementation, direction and dtype: its worst check."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["section"] == "numerics" and "failed" not in row:
            what = row["what"] + (" with adapter" if row.get("rank") else "")
            what += ", exact" if row.get("exact") else ""
            if row.get("check") == "bits":
                what = f"{row['what']}, decoded weight to the bit"
            groups.setdefault((what, row["direction"], row["dtype"]), []).append(row)
    if not groups:
        return
    yield "\n## Numerics: ||y - want|| / ||want||, want in float64\n"
    yield "| what | direction | dtype | checks | largest | tolerance | |"
    yield "|---|---|---|---|---|---|---|"
    for key, found in sorted(groups.items()):
        bad = [row for row in found if row.get("passed") is False]
        if found[0].get("check") == "bits":
            largest = f"{max(row['wrong'] for row in found)} values differ"
        elif any(row["error"] is None for row in found):
            largest = "not finite"
        else:
            largest = f"{max(row['error'] for row in found):.2e}"
        allowed = found[0].get("tolerance")
        told = "" if allowed is None else f"{allowed:.2e}" if allowed else "0"
        verdict = f"**{len(bad)} FAILED**" if bad else "passed" if told else ""
        cells = [*key, str(len(found)), largest, told, verdict]
        yield f"| {' | '.join(cells)} |"
    for row in rows:
        if row["section"] == "numerics" and row.get("passed") is False:
            figure = row.get("error", row.get("wrong"))
            yield f"- FAILED {name_of(row)}: {figure}, tolerance {row['tolerance']:.2e}"


def ceilings(rows: list[Row]) -> dict[str, float]:
    """Returns the bytes and operations a second that were measured."""
    work = {"copy": 2 * (1 << 32), "product": 2 * 8192**3}
    return {
        row["what"]: work[row["what"]] / row["us"] * 1e6
        for row in rows
        if row["section"] == "ceilings" and "us" in row
    }


def floor(
    m: int, n: int, k: int, ceiling: dict[str, float]
) -> tuple[float, str] | None:
    """Returns the fewest microseconds of a product, and what bounds it.

    Bytes: the weight's 4.127 bits, and x and y once, at the copy's rate. Operations: at
    the product's.
    """
    if len(ceiling) < 2:
        return None
    moved = n * k * BITS_A_WEIGHT / 8 + 2 * m * (n + k)
    times = {
        "bytes": moved / ceiling["copy"] * 1e6,
        "operations": 2 * m * n * k / ceiling["product"] * 1e6,
    }
    bound = max(times, key=lambda key: times[key])
    return times[bound], bound


def table(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """Returns {(n, k, direction, m): {what: row}} of the sweep, in order."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["section"] == "sweep" and "us" in row:
            key = (row["n"], row["k"], row["direction"], row["m"])
            found.setdefault(key, {})[row["what"]] = row
    return dict(sorted(found.items()))


def choice(found: dict[str, Row]) -> Row | None:
    """Returns the row of what the library takes, of a product's rows."""
    for row in found.values():
        if row.get("chosen") or row["what"] == "ours":
            return row
    return None


def sweep(rows: list[Row], ceiling: dict[str, float]) -> Iterator[str]:
    """A table for each linear and direction; times in microseconds."""
    tables: dict[tuple, dict[int, dict[str, Row]]] = {}
    for (n, k, direction, m), found in table(rows).items():
        tables.setdefault((n, k, direction), {})[m] = found
    for (n, k, direction), mine in tables.items():
        there = {what for found in mine.values() for what in found}
        columns = [what for what in OURS + RIVALS if what in there]
        rivals = [what for what in RIVALS if what in there]
        yield f"\n## {n} x {k} {direction}, us (the library's choice in bold)\n"
        heads = ["m", *(NAMES.get(what, what) for what in columns)]
        heads += ["share of the ceiling", "bound by"]
        heads += [f"{NAMES.get(what, what)} / choice" for what in rivals]
        yield f"| {' | '.join(heads)} |"
        yield "|---" * len(heads) + "|"
        for m, found in mine.items():
            cells = _cells(found, columns, rivals, floor(m, n, k, ceiling))
            yield f"| {m} | {' | '.join(cells)} |"


def _cells(
    found: dict[str, Row],
    columns: list[str],
    rivals: list[str],
    least: tuple[float, str] | None,
) -> list[str]:
    taken = choice(found)
    cells = []
    for what in columns:
        us = f"{found[what]['us']:.1f}" if what in found else ""
        cells.append(f"**{us}**" if us and found[what] is taken else us)
    cells.append(f"{least[0] / taken['us']:.0%}" if taken and least else "")
    cells.append(least[1] if least else "")
    for what in rivals:
        both = taken and what in found
        cells.append(f"{found[what]['us'] / taken['us']:.2f}" if both else "")
    return cells


def goals(rows: list[Row], ceiling: dict[str, float]) -> Iterator[str]:
    """What was aimed at, and the range that was measured."""
    lines = []

    def line(text: str, goal: float, values: dict[str, float]) -> None:
        if values:
            low, high = min(values, key=values.get), max(values, key=values.get)
            met = sum(v >= goal for v in values.values())
            lines.append(
                f"| {text} | {goal:g} | {values[low]:.2f} ({low}) to {values[high]:.2f} "
                f"({high}) | {met} of {len(values)} |"
            )

    every = {key: (choice(found), found) for key, found in table(rows).items()}
    shares = {}
    for (n, k, direction, m), (best, _) in every.items():
        if best and m <= 8 and direction == "forward" and "copy" in ceiling:
            rate = n * k * BITS_A_WEIGHT / 8 / best["us"] * 1e6
            shares[f"{n} x {k}, m={m}"] = rate / ceiling["copy"]
    line("m 1 to 8: share of the copy's bandwidth", BANDWIDTH_GOAL, shares)
    for (low, high), rival, goal in GOALS:
        for direction in ("forward", "backward"):
            ratios = {
                f"{n} x {k}, m={m}": found[rival]["us"] / best["us"]
                for (n, k, d, m), (best, found) in every.items()
                if d == direction and low <= m <= high and best and rival in found
            }
            if direction == "forward" or low > 64:
                name = f"m {low} to {high}, {direction}: {rival} / choice"
                line(name, goal, ratios)
    lora: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["section"] == "lora" and "us" in row and row["m"] >= 4096:
            at = f"{row['n']} x {row['k']}, m={row['m']}"
            lora.setdefault(at, {})[row["what"]] = row["us"]
    both = {at: us for at, us in lora.items() if len(us) == 2}
    ratios = {at: us["two_pass and separate"] / us["ours"] for at, us in both.items()}
    line("adapted linear with gradients: two_pass and separate / ours", 1.05, ratios)
    steps = {
        (row["what"], row["batch"]): row["tokens_per_s"]
        for row in rows
        if row["section"] == "step" and "tokens_per_s" in row
    }
    ratios = {
        f"batch {batch}": rate / steps["peft", batch]
        for (what, batch), rate in steps.items()
        if what == "ours" and ("peft", batch) in steps
    }
    line("8B step: tokens/s of ours / PEFT + bitsandbytes", 1.8, ratios)
    if lines:
        yield "\n## Goals\n"
        yield "| what | goal | measured | met |"
        yield "|---|---|---|---|"
        yield from lines


def others(rows: list[Row]) -> Iterator[str]:
    """Adapted linears, steps and memory."""
    found = [row for row in rows if row["section"] == "lora" and "us" in row]
    if found:
        yield "\n## An adapted linear with its gradients, us\n"
    for row in found:
        yield f"- {row['n']} x {row['k']} m={row['m']} {row['what']}: {row['us']:.1f}"
    for section in ("step", "memory"):
        found = [row for row in rows if row["section"] == section and "step_s" in row]
        if found:
            yield f"\n## {section}\n"
        for row in found:
            peak = row.get("peak_gib") or (row.get("peak_bytes") or 0) / 2**30
            batch = f" batch {row['batch']}" if "batch" in row else ""
            yield (
                f"- {row['what']}{batch}: {row['tokens_per_s']:,.0f} tokens/s, "
                f"peak {peak:.2f} GiB"
            )
