"""What all tests share: four CPU devices, strict dtypes, where golden cases lie.

Imports nothing of the packages under test: jaxtyping instruments them on import, and its
plugin refuses what was imported before it.
"""

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# Programs here run a few steps, so their compilation is what takes time. The first flag
# sends all of XLA's own code past LLVM's optimizer; jax 0.10 has emitters that compile
# twice as fast as the newer ones, which later versions have alone.
QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax  # noqa: E402
import pytest  # noqa: E402

HERE = Path(__file__).parent

jax.config.update("jax_num_cpu_devices", 4)
# The command would keep what tests compile in the user's own cache folder.
os.environ["QLORA_JAX_COMPILE_CACHE"] = "off"
os.environ["QLORA_JAX_DATA_CACHE"] = "off"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with the most slow tests first, so that no core waits for one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps compiled programs in a folder of this process: many tests share theirs.

    Processes share none, since jax does not write its entries in one piece.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)  # for commands that tests start
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops what a file compiled, which would add up to gigabytes."""
    yield
    jax.clear_caches()


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
