"""What gpu/suite.py measures on which device, and in what order."""

import jax
import pytest

from pallas_kernels.device import Device
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.shapes import SHAPES
from scripts.gpu import suite, tasks, workers

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
CPU = Device("cpu")

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2"
)


@needs_mosaic
def test_the_sweep_has_every_implementation_rival_token_and_linear():
    found = tasks.tasks(H200, ("sweep",), ("bitsandbytes",))
    seen = {(t["what"], t["direction"], t["m"], t["n"], t["k"]) for t in found}
    assert len(seen) == len(found)
    assert {t["m"] for t in found} == {*(2**i for i in range(13)), 16384}
    linears = {s[1:] for name, s in SHAPES.items() if name.startswith("llama3_")}
    assert len(linears) == 8 and (1024, 8192) in linears
    for n, k in linears:
        for m in tasks.TOKENS:
            for direction in ("forward", "backward"):
                whats = {w for w, *rest in seen if rest == [direction, m, n, k]}
                want = {"hopper", "two_pass", "xla", "dense", "bitsandbytes"}
                decodes = m <= 32 and direction == "forward"
                assert whats == want | ({"decode"} if decodes else set())


@needs_mosaic
def test_the_most_telling_come_first():
    found = tasks.tasks(H200, wheels=("bitsandbytes", "peft"))
    sections = [t["section"] for t in found]
    assert sections[:3] == ["ceilings", "ceilings", "numerics"]
    timed = [t for t in found if t["section"] in ("sweep", "lora")]
    first = [t for t in timed if t["m"] in tasks.GOALS and t["what"] != "xla"]
    count = sum((t["n"], t["k"]) == (14336, 4096) for t in first if "direction" in t)
    assert all((t["n"], t["k"]) == (14336, 4096) for t in timed[:count])
    assert timed[count]["section"] == "lora"
    assert all(t["what"] == "xla" for t in timed[-100:])
    # A product's rivals stand beside it, so that a run that is cut has their ratio.
    assert [t["what"] for t in timed[:5]] == [
        "decode", "hopper", "two_pass", "dense", "bitsandbytes"]  # fmt: skip
    assert {(t["what"], t["batch"]) for t in found if t["section"] == "step"} == {
        (what, batch)
        for what in ("ours", "peft", "ours, attention by xla")
        for batch in (1, 4)
    }


@needs_mosaic
def test_steps_come_between_the_goals_and_the_tail():
    found = tasks.tasks(H200, wheels=("bitsandbytes", "peft"))
    goals, steps, tail = suite.phases(found, 12)
    shared = [t for lanes in (goals, steps, tail) for lane in lanes for t in lane.tasks]
    assert len(shared) == len(found) and all(t in shared for t in found)
    (alone,) = steps
    assert alone.alone and {t["section"] for t in alone.tasks} == {"step", "memory"}
    ours, torch = goals
    assert {t["section"] for t in ours.tasks} == {
        "ceilings",
        "numerics",
        "sweep",
        "lora",
    }
    assert all(t["m"] in tasks.GOALS for t in ours.tasks if t["section"] == "sweep")
    assert {t["what"] for t in torch.tasks} == {"bitsandbytes"} and torch.processes == 1


@needs_mosaic
def test_numerics_try_what_can_run_on_the_device():
    def of(device, **fields):
        found = tasks.tasks(device, ("numerics",))
        assert all(t["section"] == "numerics" for t in found)
        return [t for t in found if fields.items() <= t.items()]

    names = {d: {t["what"] for t in of(d)} for d in (H200, A100, CPU)}
    everywhere = {"two_pass", "xla", "attention"}
    assert names[H200] == everywhere | {"decode", "hopper"}
    assert names[A100] == everywhere | {"ampere"}
    assert names[CPU] == everywhere
    decode = {"what": "decode", "n": 1024, "k": 2048}
    assert {t["m"] for t in of(H200, **decode)} == set(range(1, 33))
    for fields in ({"dtype": "float16"}, {"codebook": "fp4"}, {"codebook": "int4"}):
        assert {1, 8} <= {t["m"] for t in of(H200, **decode, **fields)}
        for direction in ("forward", "backward"):
            for device, what in ((H200, "hopper"), (A100, "ampere")):
                assert of(device, what=what, direction=direction, **fields)
    assert of(H200, what="hopper", check="bits", direction="backward")
    assert of(A100, what="ampere", rank=16, direction="backward")
    # Each config of the shipped table, at its own shape.
    assert {(t["n"], t["k"]) for t in of(H200, what="hopper")} > {(14336, 4096)}
    assert of(H200, what="decode", n=28672, k=8192)


def test_without_a_gpu_there_are_numerics_alone():
    found = tasks.tasks(CPU, wheels=("bitsandbytes", "peft"))
    assert {t["section"] for t in found} == {"numerics"}


def test_a_large_task_is_known_by_its_size():
    large = {"section": "sweep", "m": 16384, "n": 28672, "k": 8192}
    assert tasks.size(large) > workers.LARGE_BYTES
    assert tasks.size(large | {"m": 64, "n": 4096}) < workers.LARGE_BYTES
