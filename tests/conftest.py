"""What all tests share: four CPU devices, strict dtypes, where golden cases lie.

Imports nothing of the packages under test: jaxtyping instruments them on import, and its
plugin refuses what was imported before it.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent

jax.config.update("jax_num_cpu_devices", 4)
# The command would keep what tests compile in the user's own cache folder.
os.environ["QLORA_JAX_COMPILE_CACHE"] = "off"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why tests did not run, a line a reason: a silent skip looks like a proof."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in reports)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids silent promotion where the numerics are ours; optax promotes by design."""
    room = request.path.relative_to(HERE).parts[0]
    strict = room in ("pallas_kernels", "quant", "nn", "models")
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data that is no part of the project."""
    folder = Path(os.environ.get("QLORA_JAX_SHARED") or HERE.parents[1] / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder, and {folder} is none")
    return folder


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Finds a golden case: in tests/golden, else in the shared folder, else skips."""

    def find(name: str) -> Path:
        if (HERE / "golden" / name).exists():
            return HERE / "golden" / name
        path = request.getfixturevalue("shared") / "golden" / name
        if not path.exists():
            pytest.skip(f"needs the golden case {name}, which {path} does not have")
        return path

    return find
