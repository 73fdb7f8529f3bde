"""Imports point down only (design.md, section 1), and the bottom needs jax and numpy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels
import qlora_jax

# Each may import what stands below it and its own kind, never what stands above.
LAYERS = (
    ("cli",),
    ("train", "generate", "evaluate"),
    ("io", "data"),
    ("text",),
    ("plan",),
    ("memory",),
    ("adapters", "models", "sharding"),
    ("nn", "optim"),
    ("quant",),
    ("errors",),
    ("pallas_kernels",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOTS = [Path(package.__file__).parent for package in (pallas_kernels, qlora_jax)]
FILES = sorted(file for root in ROOTS for file in root.rglob("*.py"))
BLOCKED = (
    "flax",
    "jaxtyping",
    "optax",
    "orbax",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "tyro",
    "beartype",
)


def room(module: str) -> str | None:
    """The room of a dotted module name; None outside the packages and at their front."""
    parts = module.split(".")
    if parts[0] == "pallas_kernels":
        return parts[0]
    return parts[1] if parts[0] == "qlora_jax" and len(parts) > 1 else None


def module_of(file: Path) -> str:
    root = next(root for root in ROOTS if file.is_relative_to(root))
    return ".".join(file.relative_to(root.parent).with_suffix("").parts)


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines and modules of every import, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            # `from package import module` names the module in its list.
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_module_imports_nothing_above_it(file):
    own = room(module_of(file))
    if own is None or own == "__init__":  # the front re-exports everything
        return
    assert own in LEVEL, f"{own} has no place in LAYERS"
    upward = [
        f"{file.name}:{line} imports {name}"
        for line, name in imported(ast.parse(file.read_text()))
        if (other := room(name)) in LEVEL and LEVEL[other] < LEVEL[own]
    ]
    assert not upward


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle():
    edges = {}
    for file in FILES:
        own = room(module_of(file))
        for _, name in imported(ast.parse(file.read_text())):
            other = room(name)
            if own in LEVEL and other in LEVEL and other != own:
                edges.setdefault(own, set()).add(other)
    both = {
        (a, b) for a, rooms in edges.items() for b in rooms if a in edges.get(b, ())
    }
    assert not both


def test_the_front_imports_nothing_until_a_name_is_used():
    tree = ast.parse(Path(qlora_jax.__file__).read_text())
    eager = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {name.split(".")[0] for node in eager for _, name in imported(node)}
    assert names <= sys.stdlib_module_names


def test_every_public_name_resolves():
    for name in dir(qlora_jax):
        if not name.startswith("__"):
            assert getattr(qlora_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        qlora_jax.fuse  # noqa: B018


def test_a_function_is_not_hidden_by_the_subpackage_of_its_name():
    import qlora_jax.generate.sample  # noqa: F401

    assert callable(qlora_jax.generate) and callable(qlora_jax.quantize)


PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import jax.numpy as jnp
import pallas_kernels
from qlora_jax.quant import QuantConfig, dequantize, quantize_tensor

q = quantize_tensor(jnp.ones((2, 64)), QuantConfig(double_quant=False))
assert (dequantize(q) == 1).all()
assert (pallas_kernels.nf4_matmul(jnp.ones((3, 64)), q) == 64).all()
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & set({BLOCKED!r}), loaded
print("fine")
"""


def test_kernels_and_quant_work_with_jax_and_numpy_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            "PYTHONPATH": str(ROOTS[0].parent),
            "JAX_PLATFORMS": "cpu",
            "HOME": "/tmp",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr
