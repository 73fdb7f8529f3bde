"""A worker process that measures nothing."""

import sys

import pytest

FAKE = """
import os, time
from scripts.gpu import workers

def handle(task, turn):
    what = task.get("what")
    if task["section"] == "device":
        cpu = {"platform": "cpu", "kind": "", "capability": (0, 0), "cores": 0}
        return {"device": cpu, "driver": None}
    if what == "misfit":
        raise ValueError("does not fit")
    compiled = [time.time(), time.sleep(0.03), time.time()][::2]
    with turn():
        began = time.time()
        if what == "hang":
            time.sleep(600)
        if what == "die":
            os._exit(7)
        if what == "sick":
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        print("what a library prints")
        time.sleep(0.05)
        row = {"pid": os.getpid(), "at": [began, time.time()]}
        row["compiled"] = compiled
        return row | {"passed": True, "wrong": 0, "tolerance": 0}

workers.serve(handle)
"""


@pytest.fixture
def fake() -> list[str]:
    return [sys.executable, "-c", FAKE]
