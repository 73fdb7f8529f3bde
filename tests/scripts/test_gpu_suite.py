"""scripts/gpu_suite.py, but for the timing: its tasks, its numerics, hangs, resume, report."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout, matmul, reference
from pallas_kernels.shapes import SHAPES
from pallas_kernels.tuning import Device

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_bitsandbytes  # noqa: E402
import gpu_numerics  # noqa: E402
import gpu_products  # noqa: E402
import gpu_report  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_tasks  # noqa: E402
import gpu_workers  # noqa: E402
from gpu_workers import Lane  # noqa: E402

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
CPU = Device("cpu")

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < matmul.MOSAIC_JAX, reason="needs jax >= 0.11.2"
)

# --- What is measured ---------------------------------------------------------------------


@needs_mosaic
def test_the_sweep_has_every_implementation_rival_token_and_linear():
    found = gpu_tasks.tasks(H200, ("sweep",), ("bitsandbytes",))
    seen = {(t["what"], t["direction"], t["m"], t["n"], t["k"]) for t in found}
    assert len(seen) == len(found)
    assert {t["m"] for t in found} == {*(2**i for i in range(13)), 16384}
    linears = {s[1:] for name, s in SHAPES.items() if name.startswith("llama3_")}
    assert len(linears) == 8 and (1024, 8192) in linears
    for n, k in linears:
        for m in gpu_tasks.TOKENS:
            for direction in ("forward", "backward"):
                whats = {w for w, *rest in seen if rest == [direction, m, n, k]}
                want = {"hopper", "two_pass", "xla", "dense", "bitsandbytes"}
                decodes = m <= 32 and direction == "forward"
                assert whats == want | ({"decode"} if decodes else set())


@needs_mosaic
def test_the_most_telling_come_first():
    found = gpu_tasks.tasks(H200, wheels=("bitsandbytes", "peft"))
    sections = [t["section"] for t in found]
    assert sections[:3] == ["ceilings", "ceilings", "numerics"]
    timed = [t for t in found if t["section"] in ("sweep", "lora")]
    first = [t for t in timed if t["m"] in gpu_tasks.GOALS and t["what"] != "xla"]
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
    found = gpu_tasks.tasks(H200, wheels=("bitsandbytes", "peft"))
    goals, steps, tail = gpu_suite.phases(found, 12)
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
    assert all(t["m"] in gpu_tasks.GOALS for t in ours.tasks if t["section"] == "sweep")
    assert {t["what"] for t in torch.tasks} == {"bitsandbytes"} and torch.processes == 1


@needs_mosaic
def test_numerics_try_what_can_run_on_the_device():
    def of(device, **fields):
        found = gpu_tasks.tasks(device, ("numerics",))
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
    found = gpu_tasks.tasks(CPU, wheels=("bitsandbytes", "peft"))
    assert {t["section"] for t in found} == {"numerics"}


# --- Numerics, really run -----------------------------------------------------------------


def case(what: str, direction: str = "forward", **fields) -> dict:
    task = {"section": "numerics", "what": what, "direction": direction, "m": 7}
    task |= {"n": 96, "k": 512, "dtype": "bfloat16", "codebook": "nf4", "exact": False}
    return task | {"rank": 0, "check": "error"} | fields


@pytest.mark.parametrize("what", ["xla", "two_pass"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float16"},
        {"codebook": "fp4"},
        {"codebook": "int4", "rank": 16},
        {"m": 512, "n": 512, "exact": True, "check": "bits"},
    ],
)
def test_what_is_right_passes(what, direction, fields):
    row = gpu_numerics.here(case(what, direction, **fields))
    assert row["passed"], row


def wrong_by(change) -> matmul.Implementation:
    """The 'xla' implementation with a changed result."""
    one = matmul.IMPLEMENTATIONS["xla"]
    return matmul.Implementation(
        forward=lambda *args: change(one.forward(*args)),
        backward=lambda *args: change(one.backward(*args)),
        refuses=one.refuses,
    )


def lost_block(y):
    return y.at[-1, -16:].set(0)


def scaled(y):
    return (y.astype(jnp.float32) * 1.004).astype(y.dtype)


def unwritten(y):
    return y.at[3, 5].set(jnp.nan)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("change", [lost_block, scaled, unwritten])
def test_what_is_wrong_fails(monkeypatch, direction, change):
    monkeypatch.setitem(gpu_numerics.ROUNDINGS, "wrong", 2)
    monkeypatch.setitem(matmul.IMPLEMENTATIONS, "wrong", wrong_by(change))
    row = gpu_numerics.here(case("wrong", direction, m=200))
    assert row["passed"] is False, row


def test_weights_that_are_near_are_not_exact(monkeypatch):
    def twice_rounded(x, w, addend, choice, device):
        w = reference.dequantize(w, "float16").astype(x.dtype)
        return jnp.dot(x, w.T, preferred_element_type=jnp.float32).astype(x.dtype)

    one = matmul.Implementation(
        forward=twice_rounded, backward=None, refuses=lambda *_: None
    )
    monkeypatch.setitem(matmul.IMPLEMENTATIONS, "near", one)
    row = gpu_numerics.here(case("near", m=512, n=512, exact=True, check="bits"))
    assert row["passed"] is False and 0 < row["wrong"] < 512 * 512 // 10


def test_the_oracle_decodes_as_the_reference():
    spec = layout.abstract_tensor((64, 512), codebook="fp4")
    w = gpu_numerics._random_weight(spec, np.random.default_rng(0))
    want = reference.dequantize(jax.tree.map(jnp.asarray, w), "float32")
    np.testing.assert_array_equal(gpu_numerics.decoded(w), want)


def test_a_tolerance_is_that_of_the_roundings():
    two = gpu_numerics.tolerance(case("xla"))
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(0, 5, 100_000)).astype(np.float32)
    once = (x.astype(jnp.bfloat16).astype(np.float32) - x) / x
    rms = np.sqrt(np.square(once).mean())
    assert two == pytest.approx(gpu_numerics.MARGIN * np.sqrt(2) * rms, rel=0.02)


# --- Products and times -------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        {"section": "sweep", "what": "dense", "direction": "forward"},
        {"section": "sweep", "what": "dense", "direction": "backward"},
        {"section": "sweep", "what": "two_pass", "direction": "forward"},
        {"section": "sweep", "what": "xla", "direction": "backward"},
        {"section": "lora", "what": "ours"},
        {"section": "lora", "what": "two_pass and separate"},
    ],
)
def test_a_timed_product_is_the_product(task):
    task |= {"m": 4, "n": 128, "k": 256}
    built, data = gpu_products.build(task), gpu_products.Data()
    args = [data(one) for one in built.fixed]
    (w,) = (jax.tree.map(data, one) for one in built.rotated)
    got = built.run(*args, w)
    dense = w if task["what"] == "dense" else reference.dequantize(w, "bfloat16")
    x, *rest = (np.asarray(a, np.float64) for a in args)
    dense = np.asarray(dense, np.float64)
    if task["section"] == "lora":
        dy, a, b = rest
        y, dx, da, db = got
        pairs = [
            (y, x @ dense.T + 2 * x @ a @ b),
            (dx, dy @ dense + 2 * dy @ b.T @ a.T),
        ]
        pairs += [(da, 2 * x.T @ dy @ b.T), (db, 2 * (x @ a).T @ dy)]
    else:
        pairs = [(got, x @ (dense.T if task["direction"] == "forward" else dense))]
    for y, want in pairs:
        error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
        assert error < 0.01


def test_a_statistic_is_the_median_of_all_calls_and_keeps_the_repeats():
    kernels = [1.0, 2.0] * 3  # two kernels in each of three calls
    assert gpu_products.per_call(kernels, 3) == [3.0, 3.0, 3.0]
    with pytest.raises(RuntimeError, match="6 kernels in 4 calls"):
        gpu_products.per_call(kernels, 4)
    kept = gpu_products.statistic([[3.0, 1.0, 2.0], [7.0, 5.0, 6.0]])
    assert kept["us"] in (3.0, 5.0) and kept["us_repeats"] == [2.0, 6.0]
    assert (kept["us_10"], kept["us_90"]) == (1.0, 7.0)


def test_bitsandbytes_kernels_are_ordered_and_copies_left_out():
    def event(name, kind, start, us):
        time_range = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=time_range)

    events = [
        event("gemm", "cuda", 30, 4.0),
        event("Memset (Device)", "cuda", 20, 9.0),
        event("cudaLaunchKernel", "cpu", 5, 8.0),
        event("dequantize", "cuda", 10, 3.0),
    ]
    assert gpu_bitsandbytes.kernel_times(events, "cuda") == [3.0, 4.0]


@pytest.mark.slow
def test_the_step_that_is_timed_is_a_step(monkeypatch):
    import gpu_step

    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    tiny |= {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    monkeypatch.setattr(gpu_step, "LLAMA_8B", tiny)
    task = {"section": "step", "what": "ours", "batch": 2, "seq": 32}
    turns = []

    @contextlib.contextmanager
    def turn():
        turns.append(1)
        yield

    row = gpu_step.our_step(task, turn)
    assert turns == [1]
    assert row["tokens_per_s"] == pytest.approx(64 / row["step_s"])
    assert np.isfinite(row["loss"])


# --- Workers ------------------------------------------------------------------------------

FAKE = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import gpu_workers

def handle(task, turn):
    what = task.get("what")
    if task["section"] == "device":
        cpu = {{"platform": "cpu", "kind": "", "capability": (0, 0), "cores": 0}}
        return {{"device": cpu, "driver": None}}
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
        row = {{"pid": os.getpid(), "at": [began, time.time()]}}
        row["compiled"] = compiled
        return row | {{"passed": True, "wrong": 0, "tolerance": 0}}

gpu_workers.serve(handle)
"""


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


def numbered(*whats: str) -> list[dict]:
    return [
        {"section": "numerics", "what": w, "i": i, "direction": "forward"}
        | {"dtype": "bfloat16", "check": "bits", "m": i, "n": 1, "k": 1}
        for i, w in enumerate(whats)
    ]


def test_what_hangs_dies_or_fails_has_a_row_and_spoils_no_other(fake, tmp_path):
    tasks = numbered("a", "b", "misfit", "c", "hang", "d", "die", "e", "sick", "f")
    out = tmp_path / "rows.jsonl"
    run = gpu_workers.Run(fake, out, time.time() + 100, lambda task: (60.0, 1.0))
    run([Lane(list(tasks))])
    rows = gpu_workers.read(out)
    assert [row["i"] for row in rows] == list(range(10))
    a, b, misfit, c, hang, d, die, e, sick, f = rows
    assert misfit["failed"] == "ValueError: does not fit" and "lost" not in misfit
    assert hang["failed"] == "no answer in 1 s" and hang["lost"]
    assert die["failed"] == "its process ended with status 7" and die["lost"]
    assert "CUDA_ERROR" in sick["failed"]
    # A process goes on as long as nothing went wrong on the GPU.
    assert a["pid"] == b["pid"] == c["pid"]
    assert len({row["pid"] for row in (c, d, e, f)}) == 4
    assert "what a library prints" in Path(f"{out}.log").read_text()


def test_what_hung_is_run_again_only_if_asked(fake, tmp_path):
    tasks = numbered("a", "hang", "misfit", "b")
    rows = [tasks[0] | {"us": 1.0}, tasks[1] | {"failed": "no answer", "lost": True}]
    rows += [tasks[2] | {"failed": "ValueError"}]
    assert gpu_workers.outstanding(tasks, rows) == [tasks[2], tasks[3]]
    assert gpu_workers.outstanding(tasks, rows, retry_lost=True) == tasks[1:]


def test_processes_run_one_at_a_time_and_not_while_others_compile(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    run = gpu_workers.Run(fake, out, time.time() + 100, lambda task: (60.0, 10.0))
    run([Lane(numbered(*"abcdef"), 3), Lane(numbered(*"ghi"), alone=True)])
    rows = gpu_workers.read(out)
    assert len(rows) == 9
    spans = sorted(row["at"] for row in rows)
    assert all(
        end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)
    )
    for begin, end in spans:
        for compiled in (row["compiled"] for row in rows):
            assert compiled[1] <= begin or end <= compiled[0]
    assert len({row["pid"] for row in rows if row["what"] in "ghi"}) == 3


@pytest.mark.slow
def test_the_time_cuts_the_tail_and_leaves_no_row_of_it(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    began = time.time()
    run = gpu_workers.Run(fake, out, began + 3, lambda task: (500.0, 500.0))
    run([Lane(numbered("a", "hang", "b"))])
    assert time.time() - began < 20
    assert [row["what"] for row in gpu_workers.read(out)] == ["a"]


PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import gpu_suite, gpu_tasks
tasks = [
    {{"section": "numerics", "what": "a", "direction": "forward", "dtype": "bfloat16"}}
    | {{"check": "bits", "m": m, "n": 1, "k": 1}}
    for m in range(40)
]
gpu_tasks.numerics = lambda device: tasks
sys.exit(gpu_suite.main(sys.argv[2:], [sys.executable, sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    args = ["--only", "numerics", "--out", str(out), "--workers", "2"]
    command = [sys.executable, "-c", PROGRAM, fake[1], *args]
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(gpu_workers.read(out)) < 4:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = [row for row in gpu_workers.read(out) if "m" in row]
    assert 3 <= len(done) < 40
    with open(out, "a") as stream:  # as a kill in the middle of a row leaves it
        stream.write('{"section": "numerics", "what": "a", "m')
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = [row for row in gpu_workers.read(out) if "m" in row]
    assert sorted(row["m"] for row in rows) == list(range(40))
    assert rows[: len(done)] == done


# --- The whole command, and its report ----------------------------------------------------

REAL = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import dataclasses, os
import gpu_suite, gpu_workers
from pallas_kernels import matmul
if os.environ.get("SPOIL"):
    one = matmul.IMPLEMENTATIONS["xla"]
    matmul.IMPLEMENTATIONS["xla"] = dataclasses.replace(
        one, backward=lambda *args: one.backward(*args) * 1.02
    )
gpu_workers.serve(gpu_suite.handle)
"""


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [False, True])
def test_the_command_fails_if_a_product_is_wrong(spoil, tmp_path, monkeypatch, capsys):
    (tmp_path / "real.py").write_text(REAL)
    monkeypatch.setenv("SPOIL", "1" if spoil else "")
    cases = [case(w, d) for w in ("xla", "two_pass") for d in gpu_tasks.DIRECTIONS]
    monkeypatch.setattr(gpu_tasks, "numerics", lambda device: cases)
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(tmp_path / "real.py")]
    args = ["--only", "numerics", "--out", str(out), "--workers", "1"]
    assert gpu_suite.main(args, command) == (1 if spoil else 0)
    said = capsys.readouterr().out
    assert ("FAILED section=numerics what=xla direction=backward" in said) == spoil
    assert said.count("| passed |") == (3 if spoil else 4)
    run, *rows = gpu_workers.read(out)
    assert run["section"] == "run" and run["versions"]["jax"] == jax.__version__
    assert str(tmp_path) not in json.dumps(run)
    assert len(rows) == 4
    # Again: nothing is left to do, and the verdict stays.
    assert gpu_suite.main(args, command) == (1 if spoil else 0)
    assert len(gpu_workers.read(out)) == 5


def test_a_numerics_task_that_crashed_is_a_failure():
    row = case("hopper") | {"failed": "no answer in 60 s", "lost": True}
    assert gpu_report.failed_numerics([row]) == [row]
    assert gpu_report.failed_numerics([row, case("hopper") | {"passed": True}]) == []


@pytest.mark.parametrize("minutes", ["0", "1"])
def test_what_was_not_reached_is_said(minutes, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tasks, "numerics", lambda device: numbered("a", "misfit"))
    args = ["--out", str(tmp_path / "rows.jsonl"), "--minutes", minutes]
    gpu_suite.main(args, fake)
    said = capsys.readouterr().out
    assert ("not reached in 0 minutes: 2 of numerics" in said) == (minutes == "0")


def test_the_report_reads_the_shipped_results(capsys):
    shipped = ROOT / "scripts" / "results" / "h200_suite.jsonl"
    assert gpu_suite.main(["--report", str(shipped)]) == 0
    said = capsys.readouterr().out
    assert "copy (x + 1 over 4 GiB): 3.37 TB/s" in said
    # One token of the largest linear: cuBLAS took 2.79 times as long.
    lines = said[said.index("## 14336 x 4096 forward") :].splitlines()
    (line,) = [line for line in lines[:12] if line.startswith("| 1 |")]
    assert line == "| 1 | **14.7** | 115.0 | 40.8 | 29.3 | 61% | bytes | 2.79 | 2.00 |"
    assert "ours batch 4: 5,518 tokens/s, peak 9.56 GiB" in said


def test_the_report_shows_the_choice_its_share_and_the_goals():
    ceilings = [
        {"section": "ceilings", "what": "copy", "us": 2 * (1 << 32) / 4e12 * 1e6},
        {"section": "ceilings", "what": "product", "us": 2 * 8192**3 / 8e14 * 1e6},
    ]

    def row(what, m, us, **fields):
        at = {"section": "sweep", "what": what, "direction": "forward", "m": m}
        return at | {"n": 4096, "k": 4096, "us": us} | fields

    rows = [
        *ceilings,
        row("decode", 1, 4.0, chosen=True),
        row("hopper", 1, 9.0, chosen=False),
        row("dense", 1, 12.0),
        row("hopper", 4096, 200.0, chosen=True),
        row("dense", 4096, 180.0),
        row("two_pass", 4096, 99.0, failed="an older try"),
        row("two_pass", 4096, 210.0),
    ]
    said = "\n".join(gpu_report.report(rows))
    share = (4096 * 4096 * 4.127 / 8 + 4 * 4096) / 4e12 * 1e6 / 4.0
    assert f"| 1 | **4.0** | 9.0 |  | 12.0 | {share:.0%} | bytes | 3.00 |" in said
    assert "| 4096 |  | **200.0** | 210.0 | 180.0 | 86% | operations | 0.90 |" in said
    assert "forward: dense / choice | 3 | 3.00" in said and "| 1 of 1 |" in said
    assert "| 0.95 | 0.90 (4096 x 4096, m=4096)" in said and "| 0 of 1 |" in said
    assert "an older try" not in said


def test_a_large_task_is_known_by_its_size():
    large = {"section": "sweep", "m": 16384, "n": 28672, "k": 8192}
    assert gpu_tasks.size(large) > gpu_workers.LARGE_BYTES
    assert gpu_tasks.size(large | {"m": 64, "n": 4096}) < gpu_workers.LARGE_BYTES
