"""All GPU checks and benchmarks, in one command on a host with an NVIDIA GPU.

    python -m scripts.gpu.suite                        # 25 minutes at most; again to go on
    python -m scripts.gpu.suite --only numerics sweep --minutes 10
    python -m scripts.gpu.suite --report scripts/results/h200_suite.jsonl

Sections, most telling tasks first (gpu/tasks.py): ceilings (copy bandwidth, bf16 product),
numerics (every implementation that runs here, and attention, against float64: fresh random
inputs, outputs in memory that held NaN, named tolerances; on a CPU too), sweep (1 to 16384
tokens over the linears of Llama-3 8B and 70B, both directions: each of our implementations,
cuBLAS on dense bf16 weights, bitsandbytes), lora (an adapted linear with its gradients),
step (a training step of an 8B-shaped model, PEFT + bitsandbytes too), memory (paged and
streamed steps, and a 70B-shaped one with the allocator capped at 48 and 12 GB).

Times are device time (CUPTI, the sum of a call's kernels): medians over calls that rotate
among weights larger together than the L2, random data, two repeats. Processes compile
together, then run one at a time. Rows go to scripts/results/DEVICE_suite.jsonl as they come,
and what is there is not run again: run the command again to go on. What hung or crashed
has a row too, and is tried again with --retry-lost only. What the time did not reach is
named. The status is 1 where a numerics check failed.

Needs jax >= 0.11.2 with CUDA for our kernels, flax and optax for `step`; the package need
not be installed, so a copy of the tree is enough. Rivals are timed where they are installed
in the same environment: bitsandbytes (with torch) in `sweep`, peft and transformers besides
in `step`.
"""

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.device import Device, current_device
from pallas_kernels.tuning import table_name
from scripts.bench import harness
from scripts.gpu import report, tasks, workers
from scripts.gpu.workers import Lane

WORKER = [sys.executable, "-m", "scripts.gpu.suite", "--worker"]
PACKAGES = ("jax", "jaxlib", "torch", "bitsandbytes", "peft", "transformers")


def handle(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Does one task, in a worker process; imports what it needs, as torch may be missing."""
    section, what = task["section"], task.get("what", "")
    if section == "device":
        return device_facts()
    if what == "peft":
        from scripts.gpu import peft

        return peft.peft_step(task, turn)
    if section in ("step", "memory"):
        from scripts.gpu import step

        return step.our_step(task, turn)
    if what == "bitsandbytes":
        from scripts.gpu import bitsandbytes

        return bitsandbytes.measure(task, turn)
    if section == "numerics":
        from scripts.gpu import numerics

        return numerics.check(task, turn)
    from scripts.gpu import products

    built = products.build(task)
    with turn():
        figures = products.time_on_device(built, products.Data())
    return figures | (products.chosen(task) if section == "sweep" else {})


def device_facts() -> dict[str, Any]:
    """Returns the fields of Device and the driver's version."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    except OSError:
        answer = []
    device = dataclasses.asdict(current_device())
    return {"device": device, "driver": answer[0] if answer else None}


def ask_device(command: list[str]) -> tuple[Device, str | None]:
    """Returns the device and its driver, of a process: this one must not hold the GPU."""
    worker = workers.Worker(command, None)
    worker.say('{"section": "device"}')
    try:
        answer = worker.hear(120, time.time() + 300)
    except workers.Lost as lost:
        answer = {"failed": str(lost)}
    worker.close()
    if "failed" in answer:
        sys.exit(f"error: the device could not be asked: {answer['failed']}")
    fields = answer["device"]
    device = Device(**fields | {"capability": tuple(fields["capability"])})
    return device, answer["driver"]


def parser(about: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags of a run over tasks, of the suite or the tuner."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=25, help="stop after")
    made.add_argument(
        "--workers",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="processes that compile at the same time",
    )
    made.add_argument(
        "--retry-lost", action="store_true", help="also run what hung or crashed before"
    )
    return made


def runner(args: argparse.Namespace, command: list[str], out: Path) -> workers.Run:
    """Returns what runs lanes of tasks until `args.minutes` are over."""
    end = time.time() + 60 * args.minutes
    return workers.Run(command, out, end, tasks.seconds, tasks.size)


def header(device: Device, driver: str | None, arguments: list[str]) -> dict[str, Any]:
    """Returns a run's first row."""
    return {
        "section": "run",
        "what": harness.command("gpu.suite", arguments),
        "date": harness.today(),
        "commit": harness.commit(),
        "device": device.kind or device.platform,
        "versions": harness.versions(*PACKAGES),
        "driver": driver,
    }


def wheels() -> tuple[str, ...]:
    """Returns which rivals are installed, and says what is left out without them."""
    needs = {
        "bitsandbytes": ["torch"],
        "peft": ["torch", "bitsandbytes", "transformers"],
    }
    found = []
    for name, more in needs.items():
        missing = [p for p in (name, *more) if importlib.util.find_spec(p) is None]
        if missing:
            told = f"{name} is not timed: {', '.join(missing)} not installed here"
            print(told, file=sys.stderr)
        else:
            found.append(name)
    return tuple(found)


def phases(found: list[dict[str, Any]], processes: int) -> list[list[Lane]]:
    """Shares tasks out: products that the goals speak of, steps, the other products.

    Steps compile for minutes, so not while products are timed. Our products go to all
    workers, torch's to one, and each step to a process of its own.
    """
    steps = [t for t in found if t["section"] in ("step", "memory")]
    products = [t for t in found if t not in steps]
    shared = []
    for early in (True, False):
        mine = [t for t in products if tasks.first(t) == early]
        torch = [t for t in mine if t["what"] == "bitsandbytes"]
        ours = [t for t in mine if t["what"] != "bitsandbytes"]
        shared.append([Lane(ours, processes), Lane(torch)])
    shared.insert(1, [Lane(steps, min(6, processes), alone=True)])
    return shared


def main(arguments: list[str] | None = None, command: list[str] = WORKER) -> int:
    """Runs the suite; `command` starts a worker."""
    flags = parser(__doc__)
    flags.add_argument("--out", type=Path, help="file of rows")
    sections = tasks.SECTIONS
    flags.add_argument("--only", nargs="+", choices=sections, default=sections)
    flags.add_argument("--list", action="store_true", help="print the tasks and stop")
    flags.add_argument(
        "--report", nargs="?", const="", metavar="FILE", help="print a file and stop"
    )
    flags.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = flags.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.worker:
        workers.serve(handle)
        return 0
    if args.report:
        return show(Path(args.report))
    device, driver = ask_device(command)
    name = Path(table_name(device.kind or device.platform)).stem
    out = args.out or harness.ROOT / "scripts" / "results" / f"{name}_suite.jsonl"
    if args.report is not None:
        return show(out)
    if device.platform != "gpu":
        print(f"no GPU here but {device.platform}: numerics alone", file=sys.stderr)
    rivals = wheels() if device.platform == "gpu" else ()
    found = tasks.tasks(device, tuple(args.only), rivals)
    todo = workers.outstanding(found, harness.read_rows(out), args.retry_lost)
    if args.list:
        print(*todo, sep="\n")
        return 0
    if todo:
        run = runner(args, command, out)
        harness.append_row(out, header(device, driver, arguments))
        for lanes in phases(todo, args.workers):
            run(lanes)
    status = show(out)
    missed = not_reached(todo, out)
    if missed:
        print(
            f"\nnot reached in {args.minutes:g} minutes: {missed}; run it again to go on"
        )
    print(f"\nrows: {out.name}")
    return status


def not_reached(todo: list[dict[str, Any]], out: Path) -> str:
    """Says how many tasks of each section have no row, not even of a failure."""
    rows = harness.read_rows(out)
    missed = [t for t in todo if not any(t.items() <= row.items() for row in rows)]
    counts = {s: sum(t["section"] == s for t in missed) for s in tasks.SECTIONS}
    return ", ".join(f"{count} of {s}" for s, count in counts.items() if count)


def show(out: Path) -> int:
    """Prints a file's report; returns the exit status."""
    if not out.is_file():
        print(f"error: there is no {out}", file=sys.stderr)
        return 2
    rows = harness.read_rows(out)
    print(*report.report(rows), sep="\n")
    return 1 if report.failed_numerics(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
