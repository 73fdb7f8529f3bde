"""Runs jobs on PyTorch's side, where $QLORA_JAX_TORCH_PYTHON has it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

SIDE = Path(__file__).parent / "side.py"
VARIABLE = "QLORA_JAX_TORCH_PYTHON"


@pytest.fixture
def side(tmp_path: Path) -> Callable[[Iterable[dict[str, Any]]], None]:
    """Returns a function that does jobs of side.py, all in one process."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(
            f"NOT TRIED IN PYTORCH: set ${VARIABLE} to what scripts/interop_venv prints"
        )

    def run(jobs: Iterable[dict[str, Any]]) -> None:
        file = tmp_path / "jobs.json"
        file.write_text(json.dumps(list(jobs), default=str))
        done = subprocess.run(
            [python, SIDE, file],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
