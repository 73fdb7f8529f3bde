"""Tables of what was measured: that they are read, and that their entries can run."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import oracle
import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.packed_matmul import choose, decode, hopper
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.tuning import Problem

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
BF16 = jnp.dtype(jnp.bfloat16)

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2"
)


@pytest.fixture(scope="module")
def llama():
    return dataclasses.replace(oracle.quantized((64, 256)), shape=(4096, 4096))


@needs_mosaic
def test_the_table_is_used_and_says_so(llama):
    choice = choose("forward", 300, llama, BF16, device=H200)
    entry = json.loads(table_file().read_text())["entries"][
        "forward m<=512 n=4096 k=4096 bfloat16"
    ]
    assert dict(choice.config) == entry["config"]
    assert choice.why == (
        "measured on NVIDIA H200: forward m<=512 n=4096 k=4096 bfloat16"
    )


@needs_mosaic
def test_an_entry_taken_over_from_other_tokens_does_not_say_measured(llama):
    wide = dataclasses.replace(llama, shape=(14336, 4096))
    for m, said in ((1, "measured on"), (2, "taken over from m=1 on")):
        why = choose("forward", m, wide, BF16, device=H200).why
        assert why.startswith(f"{said} NVIDIA H200: forward m<={m} "), why


def test_every_time_of_the_table_was_recorded_so():
    results = table_file().parents[2] / "scripts" / "results"
    entries = json.loads(table_file().read_text())["entries"]
    timed = {key: entry for key, entry in entries.items() if "us" in entry}
    assert timed
    for key, entry in timed.items():
        direction, _, n, k, _ = key.split()
        lines = (results / entry["source"]).read_text().splitlines()[1:]
        assert any(
            row.get("us") == entry["us"]
            and row["config"] == entry["config"]
            and (row["m"], f"n={row['n']}", f"k={row['k']}") == (entry["m"], n, k)
            and row.get("direction", "forward") == direction
            for row in map(json.loads, lines)
        ), key


def table_file():
    return Path(tuning.__file__).parent / "tuned" / "nvidia_h200.json"


@needs_mosaic
def test_every_entry_of_the_table_can_run():
    for key, entry in json.loads(table_file().read_text())["entries"].items():
        direction, m, n, k, dtype = key.split()
        problem = Problem(direction, int(m[3:]), int(n[2:]), int(k[2:]), dtype)
        assert problem.key == key
        module = {"hopper": hopper, "decode": decode}[entry["implementation"]]
        config = module.config.Config(**entry["config"])
        steps = problem.k // 256 if direction == "forward" else problem.n // 64
        if entry["implementation"] == "hopper":
            assert steps % config.split_k == 0
            # Low rank takes as many word tiles at once as a tile has planes.
            if direction == "backward":
                assert config.weight_stages >= config.warpgroups * config.planes


@needs_mosaic
def test_a_users_folder_comes_first(llama, tmp_path, monkeypatch):
    entry = {"implementation": "two_pass", "config": {}, "us": 1.0}
    path = tmp_path / tuning.table_name("NVIDIA H200")
    path.write_text(
        json.dumps({"entries": {"forward m<=512 n=4096 k=4096 bfloat16": entry}})
    )
    monkeypatch.setenv("QLORA_JAX_TUNED", str(tmp_path))
    choice = choose("forward", 512, llama, BF16, device=H200)
    assert choice.implementation == "two_pass"
    monkeypatch.delenv("QLORA_JAX_TUNED")
    assert choose("forward", 512, llama, BF16, device=H200).implementation == "hopper"
