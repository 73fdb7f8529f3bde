"""What every benchmark's record holds beside its figures."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def record(benchmark: str, append: str | None, **figures: Any) -> dict[str, Any]:
    """Returns figures with command, versions, device, commit and date; appends them."""
    import jax

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    row = {
        "benchmark": benchmark,
        # File names alone: where things lie on one machine is nobody else's business.
        "command": " ".join(
            ["python", *(Path(arg).name if arg[:1] == "/" else arg for arg in sys.argv)]
        ),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **figures,
    }
    if append:
        with open(append, "a") as stream:
            stream.write(json.dumps(row) + "\n")
    return row


def cpu_model() -> str:
    """Returns the processor's name and the cores this process may use."""
    import os

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
