"""scripts/gpu/tune.py, but for the timing: candidates, failures, table, resume."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import IMPLEMENTATIONS, ampere, choose
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.tuning import Problem
from scripts.bench import harness
from scripts.gpu import products
from scripts.gpu import tune as tuner

ROOT = Path(__file__).parents[3]

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
CARDS = [
    Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108),
    Device("gpu", "NVIDIA GeForce RTX 3090", (8, 6), 82),
    Device("gpu", "NVIDIA GeForce RTX 4090", (8, 9), 128),
]
BF16 = jnp.dtype(jnp.bfloat16)
DIRECTIONS = ("forward", "backward")

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2"
)


@needs_mosaic
@pytest.mark.parametrize("m", [1, 16, 32, 33, 4096])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_h200_tries_decode_up_to_32_tokens(direction, m):
    problem = Problem(direction, m, 14336, 4096, "bfloat16")
    found = tuner.candidates(problem, H200)
    names = [choice.implementation for choice in found]
    decodes = direction == "forward" and m <= 32
    assert set(names) == {"hopper", "two_pass", *(["decode"] if decodes else [])}
    assert len(set(found)) == len(found)
    if decodes:
        assert names.count("decode") >= 5
    free = IMPLEMENTATIONS["hopper"].configure(problem, H200, False)
    assert free in [dict(c.config) for c in found if c.implementation == "hopper"]


@needs_mosaic
@pytest.mark.parametrize("device", CARDS, ids=lambda device: device.kind)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ampere_and_ada_cards_try_ampere(device, direction):
    problem = Problem(direction, 64, 4096, 4096, "float16")
    found = tuner.candidates(problem, device)
    assert {choice.implementation for choice in found} == {"ampere", "two_pass"}
    configs = [dict(c.config) for c in found if c.implementation == "ampere"]
    assert ampere.config.configure(problem, device) in configs
    assert {c["block_m"] for c in configs} == {16, 32, 64}
    contraction = problem.k // 256 if direction == "forward" else problem.n // 64
    for config in map(lambda fields: ampere.config.Config(**fields), configs):
        assert contraction % config.split_k == 0
        if direction == "backward":
            assert config.x_stages == config.weight_stages


@pytest.mark.slow
@pytest.mark.parametrize("what", ["two_pass", "xla"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [0, 16])
def test_a_candidate_is_the_product(what, direction, rank):
    task = {"section": "tune", "what": what, "config": {}, "direction": direction}
    task |= {"m": 5, "n": 128, "k": 256, "dtype": "bfloat16", "rank": rank}
    built, data = products.build(task), products.Data()
    x, *pair = args = [data(one) for one in built.fixed]
    w = jax.tree.map(data, built.rotated[0])
    got = np.asarray(built.run(*args, w), np.float64)
    dense = np.asarray(w.decode(BF16), np.float64)
    want = np.asarray(x, np.float64) @ (dense if direction == "backward" else dense.T)
    if rank:
        u, v = (np.asarray(a, np.float64) for a in pair)
        want = want + u @ v.T
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


# --- A whole run, with made-up times ------------------------------------------------------

FAKE = """
import os
from scripts.gpu import workers
os.environ["JAX_PLATFORMS"] = "cpu"
DEVICE = {"platform": "gpu", "kind": "NVIDIA H200", "capability": (9, 0), "cores": 132}

def handle(task, turn):
    if task["section"] == "device":
        return {"device": DEVICE, "driver": None}
    config = task["config"]
    if task["what"] == "hopper" and config["block_m"] == 16:
        raise ValueError("does not fit")
    with turn():
        if task["what"] == "decode" and config.get("team") == 2:
            if not task["rank"]:
                os._exit(7)
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        us = {"decode": 9.0, "hopper": 20.0, "two_pass": 30.0}[task["what"]]
        if task["what"] == "decode" and config.get("ahead") == 2:
            us = 7.0 if not task["rank"] else 15.0
        if os.environ.get("SLOWER"):
            us += 1
        return {"us": us}

workers.serve(handle)
"""


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-c", FAKE]
    folder = tmp_path / "tuned"
    args = ["--out", str(folder), "--n", "4096", "--k", "8192", "--tokens", "8"]
    monkeypatch.setenv("QLORA_JAX_TUNED", str(folder))
    tuning._table.cache_clear()
    yield lambda *more: tuner.main([*args, "--workers", "2", *more], command)
    tuning._table.cache_clear()


@needs_mosaic
def test_the_table_has_the_fastest_and_the_failures(tune, tmp_path, capsys):
    assert tune() == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["filled"] == 2 and said["unfinished"] == 0
    table = json.loads((tmp_path / "tuned" / "nvidia_h200.json").read_text())
    entry = table["entries"]["forward m<=8 n=4096 k=8192 bfloat16"]
    assert entry["implementation"] == "decode" and entry["config"]["ahead"] == 2
    assert (entry["m"], entry["us"], entry["us_lora"]) == (8, 7.0, 15.0)
    assert entry["fastest_lora"]["us"] == 9.0
    assert entry["fastest_lora"]["config"] != entry["config"]
    reasons = {}
    for label, reason in table["failures"].items():
        key, what, config, *adapter = json.loads(label)
        at = what, config.get("team", 4), config.get("block_m"), bool(adapter)
        reasons.setdefault(at, reason)
    # What was wrong with one config is that config's alone.
    assert reasons == {
        ("decode", 2, None, False): "its process ended with status 7",
        ("decode", 2, None, True): "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS",
        ("hopper", 4, 16, False): "ValueError: does not fit",
        ("hopper", 4, 16, True): "ValueError: does not fit",
    }


@needs_mosaic
def test_the_library_takes_what_was_tuned(tune):
    w = QuantizedTensor.abstract((4096, 8192))

    def taken(direction, m):
        return choose(direction, m, w, BF16, device=H200)

    before = taken("forward", 7)
    assert "measured" not in before.why
    assert tune() == 0
    tuning._table.cache_clear()
    choice = taken("forward", 7)
    assert choice.implementation == "decode" and dict(choice.config)["ahead"] == 2
    assert choice.why == (
        "measured on NVIDIA H200: forward m<=8 n=4096 k=8192 bfloat16"
    )
    assert taken("backward", 8).implementation == "hopper"
    assert taken("forward", 9).why == before.why  # another bucket


@needs_mosaic
def test_it_goes_on_where_it_was_and_measures_again_if_asked(
    tune, tmp_path, monkeypatch
):
    folder = tmp_path / "tuned"
    path, log = folder / "nvidia_h200.json", folder / "nvidia_h200.jsonl"
    assert tune("--minutes", "0") == 0
    assert json.loads(path.read_text())["entries"] == {}
    assert tune() == 0
    rows, table = harness.read_rows(log), path.read_text()
    # As a run that was killed before its last row leaves it.
    lines = log.read_text().splitlines()
    last = next(i for i in reversed(range(len(lines))) if "failed" not in lines[i])
    log.write_text("\n".join(lines[:last] + lines[last + 1 :]) + "\n")
    path.unlink()
    assert tune() == 0
    missing = json.loads(lines[last])
    new = harness.read_rows(log)[len(lines) - 1 :]
    assert missing in new and all(row == missing or "failed" in row for row in new)
    assert path.read_text() == table
    count = len(harness.read_rows(log))
    assert tune() == 0  # the table has all
    assert len(harness.read_rows(log)) == count
    monkeypatch.setenv("SLOWER", "1")
    assert tune("--again") == 0
    entry = json.loads(path.read_text())["entries"]
    assert entry["forward m<=8 n=4096 k=8192 bfloat16"]["us"] == 8.0
    assert len(harness.read_rows(log)) == count + 1 + len(rows)


@needs_mosaic
def test_a_product_that_is_half_measured_has_no_entry():
    every = tuner.tasks([Problem("backward", 64, 512, 512, "bfloat16")], H200)
    table = {"entries": {}, "failures": {}}
    rows = [task | {"us": 10.0 + i} for i, task in enumerate(every)]
    assert tuner.filled(table, every, rows[:-1]) == (table, set())
    found, finished = tuner.filled(table, every, rows)
    assert len(found["entries"]) == len(finished) == 1


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert tuner.main(["--out", str(tmp_path)]) == 2
    assert "tuning needs a GPU, this is cpu" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_the_shipped_table_is_as_the_tuner_writes_it():
    path = ROOT / "pallas_kernels" / "tuned" / "nvidia_h200.json"
    assert tuner.written(json.loads(path.read_text())) == path.read_text()
