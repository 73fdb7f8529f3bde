"""Times a QLoRA training step against PEFT + bitsandbytes and qwix, on the CPU.

One step is loss, gradient of the adapters and AdamW's update of a 4-layer Llama
(hidden 1024, mlp 2816) on one batch of 2 x 256 tokens, with rank 16 on all seven
linears. Each contestant runs in its own process, with its own packages
(bench/peers), on the same weights and tokens; all are built first and
then take their steps in turns. Ratios are medians over the rounds.

    python -m scripts.bench.train_step \
        --peft-python PEFT_VENV/bin/python --qwix-python QWIX_VENV/bin/python \
        --vocab-size 32000 --append scripts/results/train_step.jsonl

The interpreters can also be given as QLORA_PEFT_PYTHON and QLORA_QWIX_PYTHON;
contestants without one are left out. The environments are
`pip install torch transformers peft bitsandbytes` and `pip install qwix optax`.
Ours runs in the Python that runs this, unless --ours-python says otherwise: take the
same jax for ours as for qwix, or a newer one: before 0.11 it multiplies bfloat16 on
the CPU five times slower.

Two more modes, of ours alone unless --contestants says otherwise, need a quiet
machine less: --memory asks XLA what loss and gradient take, and --compile-time how
long the train step takes to compile at 4 and at 32 layers.

A table for people goes to stdout, then one line of JSON.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace

from scripts.bench import harness
from scripts.bench.peers.children import (
    NOISY_SHARE,
    ChildError,
    measure_once,
    note,
    race,
)
from scripts.bench.peers.protocol import Task

PYTHONS = {
    "ours": "QLORA_OURS_PYTHON",
    "peft": "QLORA_PEFT_PYTHON",
    "qwix": "QLORA_QWIX_PYTHON",
}
"""Families of contestants, and the variable that may name their interpreter."""
COMPILE_LAYERS = (4, 32)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--memory", action="store_true", help="XLA's account of memory")
    mode.add_argument("--compile-time", action="store_true", help="seconds to compile")
    this = sys.executable
    for family, variable in PYTHONS.items():
        parser.add_argument(
            f"--{family}-python",
            default=os.environ.get(variable, this if family == "ours" else None),
            help=f"interpreter for {family}; default ${variable}",
        )
    parser.add_argument(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="{ours,peft,qwix}-{nf4,dense}, options after a colon, as in"
        " peft-nf4:adapter=autocast (see the children); default: all that can run",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["bfloat16", "float32"],
        choices=["bfloat16", "float32"],
        help="raced one after the other, to hold one set of models at a time",
    )
    parser.add_argument("--vocab-size", type=int, help="default 32000; --memory: 4096")
    parser.add_argument("--checkpoint", choices=["none", "layer"], default="none")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument(
        "--retries",
        type=int,
        default=5,
        help="a turn that other programs disturb is run again, so many times at most",
    )
    arguments = parser.parse_args()
    if arguments.contestants is None:
        arguments.contestants = default_contestants(arguments)
    problems = [
        f"{name}: needs --{family}-python or ${PYTHONS[family]}"
        for name in arguments.contestants
        if (family := name.split("-")[0]) in PYTHONS
        and not interpreter(arguments, family)
    ]
    problems += [
        f"{name}: no such contestant; they are {{ours,peft,qwix}}-{{nf4,dense}}"
        for name in arguments.contestants
        if name.split(":")[0] not in all_contestants()
    ]
    if problems:
        parser.error("\n".join(problems))
    return arguments


def all_contestants() -> list[str]:
    """Returns the plain names."""
    return [f"{family}-{base}" for family in PYTHONS for base in ("nf4", "dense")]


def interpreter(arguments: argparse.Namespace, family: str) -> str | None:
    """Returns the Python of a family of contestants."""
    return getattr(arguments, f"{family}_python")


def default_contestants(arguments: argparse.Namespace) -> list[str]:
    """Returns the contestants that can run in this mode with these interpreters."""
    families = ["ours"]
    if not (arguments.memory or arguments.compile_time):
        families = [family for family in PYTHONS if interpreter(arguments, family)]
    return [n for n in all_contestants() if n.split("-")[0] in families]


def entry(arguments: argparse.Namespace, name: str, **fields) -> tuple[str, Task]:
    """Returns the interpreter and the task of a contestant.

    Args:
      arguments: The command line.
      name: Contestant, with options after a colon.
      **fields: Fields of the task.
    """
    plain, _, options = name.partition(":")
    family, base = plain.split("-")
    pairs = [pair.split("=", 1) for pair in options.split(",") if pair]
    task = Task(contestant=name, quantized=base == "nf4", options=dict(pairs), **fields)
    return interpreter(arguments, family), task


def time_steps(arguments: argparse.Namespace) -> list[dict]:
    """Races the contestants, one dtype after the other."""
    rows = []
    for dtype in arguments.dtypes:
        fields = {
            "dtype": dtype,
            "vocab_size": arguments.vocab_size or 32000,
            "checkpoint": arguments.checkpoint,
        }
        entries = [entry(arguments, name, **fields) for name in arguments.contestants]
        rows += race(entries, arguments.rounds, arguments.steps, arguments.retries)
    return rows


def measure_memory(arguments: argparse.Namespace) -> list[dict]:
    """Asks XLA what memory loss and gradient take, with and without checkpointing."""
    rows = []
    for dtype, checkpoint, name in itertools.product(
        arguments.dtypes, ("none", "layer"), arguments.contestants
    ):
        python, task = entry(
            arguments,
            name,
            dtype=dtype,
            vocab_size=arguments.vocab_size or 4096,
            checkpoint=checkpoint,
            mode="memory",
        )
        row = {"contestant": name, "dtype": dtype, "checkpoint": checkpoint}
        rows.append(row | measured(python, task))
    return rows


def measure_compile_time(arguments: argparse.Namespace) -> list[dict]:
    """Times the compilation of the train step of a narrow model, by depth."""
    rows = []
    for dtype, name in itertools.product(arguments.dtypes, arguments.contestants):
        python, task = entry(
            arguments,
            name,
            dtype=dtype,
            vocab_size=arguments.vocab_size or 4096,
            hidden_size=256,
            intermediate_size=768,
            num_heads=4,
            num_kv_heads=4,
            checkpoint=arguments.checkpoint,
            mode="compile",
        )
        shallow_s = None
        for layers in COMPILE_LAYERS:
            row = {"contestant": name, "dtype": dtype, "layers": layers}
            row |= measured(python, replace(task, num_layers=layers))
            shallow_s = shallow_s or row.get("compile_s")
            if "compile_s" in row:
                row["vs_shallow"] = row["compile_s"] / shallow_s
            rows.append(row)
    return rows


def measured(python: str, task: Task) -> dict:
    """Returns what a child measured, or its error."""
    try:
        return measure_once(python, task)
    except ChildError as error:
        note(str(error))
        return {"error": error.args[0].partition("\n")[0]}


COLUMNS = {
    "time": {
        "median ms": "median_ms",
        "best": "best_ms",
        "p20": "p20_ms",
        "p80": "p80_ms",
        "x ours-nf4": "vs_ours",
        "x own dense": "vs_own_dense",
        "others": "others_cpu_share",
        "base MiB": "base_mib",
        "built MiB": "rss_after_build_mib",
        "peak, steps": "rss_peak_steps_mib",
        "peak, all": "rss_peak_mib",
        "first loss": "loss_first",
        "last loss": "loss_last",
    },
    "memory": {
        "checkpoint": "checkpoint",
        "arguments MiB": "arguments_mib",
        "temporaries MiB": "temporaries_mib",
        "total MiB": "total_mib",
    },
    "compile": {
        "layers": "layers",
        "trace s": "trace_s",
        "compile s": "compile_s",
        "x shallow": "vs_shallow",
    },
}
"""Headings and fields of each mode's table, after contestant and dtype."""


def format_table(rows: list[dict], columns: dict[str, str]) -> str:
    """Returns the rows as aligned text; a failed one shows where its error went."""
    columns = {"contestant": "contestant", "dtype": "dtype"} | columns

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
        return "-" if value is None else str(value)

    cells = [list(columns)]
    for row in rows:
        cells.append([cell(row.get(field)) for field in columns.values()])
        if "error" in row:
            cells[-1][2] = "failed"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        names = [text.ljust(w) for text, w in zip(line[:2], widths[:2], strict=True)]
        rest = [text.rjust(w) for text, w in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join(names + rest))
    return "\n".join(lines)


def main() -> int:
    """Runs the chosen mode, prints, and appends the record."""
    arguments = parse_arguments()
    figures = {"load_before": os.getloadavg()[0]}
    if arguments.memory:
        mode, rows = "memory", measure_memory(arguments)
    elif arguments.compile_time:
        mode, rows = "compile", measure_compile_time(arguments)
    else:
        mode, rows = "time", time_steps(arguments)
        figures |= {"vocab_size": arguments.vocab_size or 32000}
        figures |= {"checkpoint": arguments.checkpoint}
        figures |= {"rounds": arguments.rounds, "steps": arguments.steps}
    print(format_table(rows, COLUMNS[mode]))
    still = [r["contestant"] for r in rows if r.get("loss_fell") is False]
    noisy = [r for r in rows if r.get("others_cpu_share", 0) > NOISY_SHARE]
    if noisy:
        print("other programs kept the machine busy (others): not to be relied on")
    if still:
        print(f"the loss did not fall: {', '.join(still)}")
    # Each contestant's own versions, not those of the Python that runs this.
    versions = {}
    for row in rows:
        if "versions" in row:
            versions[row["contestant"].split("-")[0]] = row.pop("versions")
    harness.record(
        "train_step",
        arguments.append,
        versions=versions,
        mode=mode,
        **figures,
        rows=rows,
    )
    return 1 if still or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
