"""QLoRA in JAX: 4-bit base weights, LoRA adapters trained through them.

The public names stand in `__init__.pyi`, beside this file, and each is explained where it
is defined. They load on first use, so that `pallas_kernels` works on a host with jax and
numpy alone.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Returns {public name: the module that defines it}, of the stub's imports."""
    stub = ast.parse(Path(__file__).with_name("__init__.pyi").read_text("utf-8"))
    return {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


_HOME_OF = _homes()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME_OF, "__version__"])
