"""Measures kernel configs on the GPU here, and fills its table of choices.

    python -m scripts.gpu.tune                       # into pallas_kernels/tuned/
    QLORA_JAX_TUNED=~/tuned python -m scripts.gpu.tune --out ~/tuned --n 5120 --k 13824

For every product (direction, tokens, n, k) the candidates of all implementations that can
run here are timed as gpu/suite.py times (device time, rotating weights, scales decoded
along), and the fastest is kept. Each is timed again with an adapter of rank 16. The table's
key has no rank, so its choice is the fastest without; "us_lora" is that choice's time with
an adapter, and "fastest_lora" is there where another is faster then.

Rows go to DEVICE.jsonl beside the table as they come: run it again to go on. A candidate
that fails, hangs (60 s) or crashes is kept under "failures" with its reason, and its process
is replaced, so that those after it are not touched. Products that the table has are not
measured again unless --again is given; what --minutes did not reach is counted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.packed_matmul import IMPLEMENTATIONS
from pallas_kernels.shapes import SHAPES
from pallas_kernels.tuning import Choice, Problem
from scripts.bench import harness
from scripts.gpu import suite
from scripts.gpu.tasks import DIRECTIONS, LARGE, RANK, SMALL, TOKENS, can
from scripts.gpu.workers import Lane, outstanding

NOTE = (
    "us: device time of the whole product at m tokens. An entry whose m is not its key's "
    "was not measured at its own tokens. Entries without us were chosen by hand among "
    "timings whose program was not kept; --again measures them."
)


def candidates(problem: Problem, device: Device) -> list[Choice]:
    """Returns what may run a product, each implementation's favourites first."""
    at = (problem.direction, problem.m, problem.n, problem.k, device, problem.dtype)
    return [
        Choice(name, tuple(sorted(fields.items())))
        for name, one in IMPLEMENTATIONS.items()
        if can(name, *at)
        for fields in one.candidates(problem, device)
    ]


def tasks(problems: list[Problem], device: Device) -> list[dict[str, Any]]:
    """Returns each candidate of each product, without and with an adapter."""
    return [
        {
            "section": "tune",
            "what": choice.implementation,
            "config": dict(choice.config),
        }
        | {"direction": p.direction, "m": p.m, "n": p.n, "k": p.k, "dtype": p.dtype}
        | {"rank": rank}
        for p in problems
        for choice in candidates(p, device)
        for rank in (0, RANK)
    ]


def problem_of(task: dict[str, Any]) -> Problem:
    return Problem(*(task[key] for key in ("direction", "m", "n", "k", "dtype")))


def filled(
    table: dict[str, Any], every: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> tuple[dict[str, Any], set[Problem]]:
    """Returns the table with the products whose every candidate has a row, and those."""
    entries, failures = dict(table["entries"]), dict(table["failures"])
    finished = set()
    for problem in dict.fromkeys(problem_of(task) for task in every):
        mine = [row for row in rows if problem_of(row) == problem]
        for row in mine:  # the last one counts
            label = [problem.key, row["what"], row["config"]]
            label = json.dumps(label + (["adapter"] if row["rank"] else []))
            failures.pop(label, None)
            if "failed" in row:
                failures[label] = row["failed"][:200]
        if all(
            any(task.items() <= row.items() for row in mine)
            for task in every
            if problem_of(task) == problem
        ):
            finished.add(problem)
            if any("us" in row for row in mine if not row["rank"]):
                entries[problem.key] = entry(problem, mine)
    failures = dict(sorted(failures.items()))  # rows come in any order
    return table | {"entries": entries, "failures": failures}, finished


def entry(problem: Problem, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the table's entry of a product's rows."""
    plain = [row for row in rows if "us" in row and not row["rank"]]
    adapted = [row for row in rows if "us" in row and row["rank"]]
    best = min(plain, key=lambda row: row["us"])
    found = {"implementation": best["what"], "config": best["config"]}
    found |= {"m": problem.m, "us": round(best["us"], 2), "source": "gpu/tune.py"}
    for row in adapted:
        if (row["what"], row["config"]) == (best["what"], best["config"]):
            found["us_lora"] = round(row["us"], 2)
    if adapted:
        other = min(adapted, key=lambda row: row["us"])
        if round(other["us"], 2) < found.get("us_lora", float("inf")):
            found["fastest_lora"] = {
                "implementation": other["what"],
                "config": other["config"],
                "us": round(other["us"], 2),
            }
    return found


def written(table: dict[str, Any]) -> str:
    """Returns a table's JSON, an entry a line."""

    def lines(name: str) -> str:
        each = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table[name].items()]
        return (
            f' "{name}": {{\n' + ",\n".join(each) + "\n }"
            if each
            else f' "{name}": {{}}'
        )

    rest = {k: v for k, v in table.items() if k not in ("entries", "failures")}
    heads = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rest.items()]
    return "{\n" + ",\n".join([*heads, lines("entries"), lines("failures")]) + "\n}\n"


def main(arguments: list[str] | None = None, command: list[str] = suite.WORKER) -> int:
    """Tunes; `command` starts a worker."""
    parser = suite.parser(__doc__)
    tuned = Path(tuning.__file__).parent / "tuned"
    parser.add_argument("--out", type=Path, default=tuned, help="folder of tables")
    parser.add_argument("--n", type=int, help="one shape instead of Llama-3 8B's")
    parser.add_argument("--k", type=int)
    parser.add_argument("--large", action="store_true", help="Llama-3 70B's too")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--again", action="store_true", help="what is there too")
    args = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if (args.n is None) != (args.k is None):
        print("error: give both --n and --k, or neither", file=sys.stderr)
        return 2
    device, _ = suite.ask_device(command)
    if device.platform != "gpu":
        print(f"error: tuning needs a GPU, this is {device.platform}", file=sys.stderr)
        return 2
    names = SMALL + (LARGE if args.large else ())
    shapes = [(SHAPES[name].n, SHAPES[name].k) for name in names]
    if args.n:
        shapes = [(args.n, args.k)]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / tuning.table_name(device.kind)
    log = path.with_suffix(".jsonl")
    table = {"device": device.kind, "note": NOTE, "entries": {}, "failures": {}}
    if path.exists():
        table |= json.loads(path.read_text())
    if args.again:
        harness.append_row(log, {"section": "again"})
    rows, again = since(log)
    problems = [
        problem
        for n, k in shapes
        for m in args.tokens
        for direction in DIRECTIONS
        if (problem := Problem(direction, m, n, k, args.dtype)).key
        not in (() if again else table["entries"])
    ]
    every = tasks(problems, device)
    todo = outstanding(every, rows, args.retry_lost)
    suite.runner(args, command, log)([Lane(todo, args.workers)])
    table, finished = filled(table, every, since(log)[0])
    path.write_text(written(table))
    missed = len(problems) - len(finished)
    if missed:
        print(f"{missed} products are not finished; run it again", file=sys.stderr)
    said = {"out": path.name, "filled": len(finished), "unfinished": missed}
    print(json.dumps(said | {"failures": len(table["failures"])}))
    return 0


def since(log: Path) -> tuple[list[dict[str, Any]], bool]:
    """Returns the rows after the last --again, and whether there was one."""
    rows, again = [], False
    for row in harness.read_rows(log):
        if row["section"] == "again":
            rows, again = [], True
        else:
            rows.append(row)
    return rows, again


if __name__ == "__main__":
    sys.exit(main())
