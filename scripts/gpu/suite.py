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
not be installed. Rivals are timed where they are installed in the same environment:
bitsandbytes (with torch) in `sweep`, peft and transformers besides in `step`.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_report  # noqa: E402
import gpu_workers  # noqa: E402
from gpu_workers import Lane  # noqa: E402

SECTIONS = ("ceilings", "numerics", "sweep", "lora", "step", "memory")
WORKER = [sys.executable, __file__, "--worker"]
PACKAGES = ("jax", "jaxlib", "torch", "bitsandbytes", "peft", "transformers")


def handle(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Does one task, in a worker process."""
    section, what = task["section"], task.get("what", "")
    if section == "memory":
        import gpu_memory

        gpu_memory.cap(what)  # before jax starts
        return gpu_memory.memory_step(task, turn())
    if section == "step":
        import gpu_step

        return (gpu_step.peft_step if what == "peft" else gpu_step.our_step)(task, turn)
    if what == "bitsandbytes":
        import gpu_bitsandbytes

        return gpu_bitsandbytes.measure(task, turn)
    if section == "device":
        return device_facts()
    if section == "numerics":
        import gpu_numerics

        return gpu_numerics.check(task, turn)
    import gpu_products

    built = gpu_products.build(task)
    with turn():
        figures = gpu_products.time_on_device(built, gpu_products.Data())
    return figures | (gpu_products.chosen(task) if section == "sweep" else {})


def device_facts() -> dict[str, Any]:
    """Returns the fields of Device and the driver's version."""
    import dataclasses

    from pallas_kernels.device import current_device

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    except OSError:
        answer = []
    device = dataclasses.asdict(current_device())
    return {"device": device, "driver": answer[0] if answer else None}


def ask_device(command: list[str]) -> dict[str, Any]:
    """Returns device_facts of a process of its own: this one must not hold the GPU."""
    worker = gpu_workers.Worker(command, None)
    worker.say('{"section": "device"}')
    try:
        answer = worker.hear(120, time.time() + 300)
    except gpu_workers.Lost as lost:
        answer = {"failed": str(lost)}
    worker.close()
    if "failed" in answer:
        sys.exit(f"error: the device could not be asked: {answer['failed']}")
    return answer


def header(facts: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Returns a run's first row."""
    found = [p for p in PACKAGES if importlib.util.find_spec(p)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.strip()
    names = [Path(a).name if a[:1] == "/" else a for a in arguments]
    versions = {p: importlib.metadata.version(p) for p in found}
    return {
        "section": "run",
        "what": " ".join(["python -m scripts.gpu.suite", *names]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "device": facts["device"]["kind"] or facts["device"]["platform"],
        "versions": versions | {"python": sys.version.split()[0]},
        "driver": facts["driver"],
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


def phases(tasks: list[dict[str, Any]], workers: int) -> list[list[Lane]]:
    """Shares tasks out: products that the goals speak of, steps, the other products.

    Steps compile for minutes, so not while products are timed. Our products go to all
    workers, torch's to one, and each step to a process of its own.
    """
    import gpu_tasks

    steps = [t for t in tasks if t["section"] in ("step", "memory")]
    products = [t for t in tasks if t not in steps]
    found = []
    for early in (True, False):
        mine = [t for t in products if gpu_tasks.first(t) == early]
        torch = [t for t in mine if t["what"] == "bitsandbytes"]
        ours = [t for t in mine if t["what"] != "bitsandbytes"]
        found.append([Lane(ours, workers), Lane(torch)])
    found.insert(1, [Lane(steps, min(6, workers), alone=True)])
    return found


def main(arguments: list[str] | None = None, command: list[str] = WORKER) -> int:
    """Runs the suite; `command` starts a worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file of rows")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--minutes", type=float, default=25, help="stop after")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument(
        "--retry-lost", action="store_true", help="also what hung or crashed before"
    )
    parser.add_argument("--list", action="store_true", help="print the tasks and stop")
    parser.add_argument(
        "--report", nargs="?", const="", metavar="FILE", help="print a file and stop"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.worker:
        gpu_workers.serve(handle)
        return 0
    if args.report:
        return show(Path(args.report))
    facts = ask_device(command)
    import gpu_tasks

    from pallas_kernels.device import Device
    from pallas_kernels.tuning import table_name

    fields = facts["device"] | {"capability": tuple(facts["device"]["capability"])}
    device = Device(**fields)
    name = Path(table_name(device.kind or device.platform)).stem
    out = args.out or ROOT / "scripts" / "results" / f"{name}_suite.jsonl"
    if args.report is not None:
        return show(out)
    if device.platform != "gpu":
        print(f"no GPU here but {device.platform}: numerics alone", file=sys.stderr)
    rivals = wheels() if device.platform == "gpu" else ()
    tasks = gpu_tasks.tasks(device, tuple(args.only), rivals)
    todo = gpu_workers.outstanding(tasks, gpu_workers.read(out), args.retry_lost)
    if args.list:
        print(*todo, sep="\n")
        return 0
    if todo:
        end = time.time() + 60 * args.minutes
        out.parent.mkdir(parents=True, exist_ok=True)
        gpu_workers.append(out, header(facts, arguments))
        run = gpu_workers.Run(command, out, end, gpu_tasks.seconds, gpu_tasks.size)
        for lanes in phases(todo, args.workers):
            run(lanes)
    status = show(out)
    missed = gpu_workers.outstanding(tasks, gpu_workers.read(out))
    missed = [t for t in missed if t in todo and not tried(t, out)]
    if missed:
        counts = {s: sum(t["section"] == s for t in missed) for s in SECTIONS}
        told = ", ".join(f"{count} of {s}" for s, count in counts.items() if count)
        print(
            f"\nnot reached in {args.minutes:g} minutes: {told}; run it again to go on"
        )
    print(f"\nrows: {out.name}")
    return status


def tried(task: dict[str, Any], out: Path) -> bool:
    """Returns whether there is a row of the task, if only of a failure."""
    return any(task.items() <= row.items() for row in gpu_workers.read(out))


def show(out: Path) -> int:
    """Prints a file's report; returns the exit status."""
    if not out.is_file():
        print(f"error: there is no {out}", file=sys.stderr)
        return 2
    rows = gpu_workers.read(out)
    print(*gpu_report.report(rows), sep="\n")
    return 1 if gpu_report.failed_numerics(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
