"""Tells where the tests' time goes: `scripts/test -p costs ...` ends with a table by file.

Every test reports the seconds that jax spent in tracing, in lowering and in the compilers
(XLA, LLVM and, for a GPU, ptxas), how many programs it compiled, how many it found in the
persistent cache, and its process's peak memory. What is left is execution, the interpreter
of kernels, and Python.
"""

import resource
from collections import Counter, defaultdict
from collections.abc import Iterator

import jax
import pytest

_CAUSES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_spent: Counter[str] = Counter()


def _listen(event: str, seconds: float, **_: object) -> None:
    if cause := _CAUSES.get(event):
        _spent[cause] += seconds
        _spent["programs"] += cause == "compile"


def _count(event: str, **_: object) -> None:
    _spent["cached"] += event == "/jax/compilation_cache/cache_hits"


def pytest_configure(config: pytest.Config) -> None:
    jax.monitoring.register_event_duration_secs_listener(_listen)
    jax.monitoring.register_event_listener(_count)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Hangs what was spent since the last report on this one; xdist carries it over."""
    outcome = yield
    report = outcome.get_result()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.user_properties = [("costs", {**_spent, "peak": peak})]
    _spent.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            costs = dict(getattr(report, "user_properties", ())).get("costs")
            if costs is None:
                continue
            row = files[report.nodeid.partition("::")[0]]
            peak = max(row["peak"], costs.pop("peak"))
            row.update(costs)
            row["peak"] = peak
            row["seconds"] += report.duration
            row["tests"] += report.when == "call"
    names = ["tests", "seconds", "trace", "lower", "compile", "programs", "cached"]
    total = Counter[str]()
    write = terminalreporter.write_line
    write(f"\n{'':44}" + "".join(f"{n:>9}" for n in [*names, "rest", "GiB"]))
    for file, row in sorted(files.items(), key=lambda kv: -kv[1]["seconds"]):
        total.update({name: row[name] for name in names})
        _line(write, file.removeprefix("tests/"), row, names)
    _line(write, "all", total, names)


def _line(write, label: str, row: Counter[str], names: list[str]) -> None:
    rest = row["seconds"] - row["trace"] - row["lower"] - row["compile"]
    cells = [f"{row[n]:9.0f}" for n in names] + [f"{rest:9.0f}{row['peak']:9.1f}"]
    write(f"{label:44}" + "".join(cells))
