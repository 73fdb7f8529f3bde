"""Imports point down only (design.md, section 1), and the bottom needs jax and numpy."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import pallas_kernels
import qlora_jax
from pallas_kernels.formats import FORMATS
from pallas_kernels.formats.absmax4.layout import Layout

# Each may import what stands below it and its own kind, never what stands above.
LAYERS = (
    ("cli",),
    ("train", "inference", "evaluate"),
    ("objectives",),
    ("sources", "exchange", "data"),
    ("text",),
    ("budget",),
    ("adapters", "models"),
    ("sharding",),
    ("nn", "optim"),
    ("config",),
    ("toml", "names", "user_folder", "matching"),
    ("files", "inputs", "schema"),
    ("digests", "disk", "match_worker"),
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


def test_layers_list_the_rooms_that_there_are():
    rooms = {room(module_of(file)) for file in FILES} - {None, "__init__"}
    assert rooms == LEVEL.keys()


CONCRETE = {form.__name__ for form in FORMATS.values()}
LAYOUTS = set(get_args(Layout))
# They make weights of a format that a setting names, or give its name to users. All other
# files hold PackedWeights, whichever they are; the kernels of 4 bits are in packed_matmul.
NAMES_A_FORMAT = {
    "pallas_kernels.__init__",
    "pallas_kernels.matmul",
    "qlora_jax.cli.doctor",
    "qlora_jax.budget.estimate",
    "qlora_jax.nn.packing",
    "qlora_jax.sources.bitsandbytes",
}
ASKS = ("isinstance", "issubclass", "type")
ABOVE_FORMATS = [file for file in FILES if "formats" not in file.parts]


def asked_formats(tree: ast.AST) -> list[str]:
    """Returns the questions that code asks about the format or layout of a weight."""
    questions: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            questions += node.args if node.func.id in ASKS else []
        if isinstance(node, ast.Compare | ast.match_case):
            questions.append(node)
    return [ast.unparse(one) for one in questions if any(map(_named, ast.walk(one)))]


def _named(node: ast.AST) -> bool:
    """Whether code names a concrete format, or has a layout's name for a value."""
    if isinstance(node, ast.Constant):
        return node.value in LAYOUTS
    return getattr(node, "id", getattr(node, "attr", None)) in CONCRETE


@pytest.mark.parametrize("file", ABOVE_FORMATS, ids=module_of)
def test_nothing_above_the_formats_asks_which_one_a_weight_has(file):
    assert not asked_formats(ast.parse(file.read_text()))


def test_a_question_about_a_format_is_found():
    for code in (
        "isinstance(w, QuantizedTensor | Int8Rows)",
        "type(w) is Int8Rows",
        'w.layout == "flat"',
        "match w:\n case Int8Rows(): pass",
    ):
        assert asked_formats(ast.parse(code)), code
    assert not asked_formats(ast.parse("isinstance(w, PackedWeight)"))


def test_few_files_name_a_concrete_format():
    naming = {
        module_of(file)
        for file in ABOVE_FORMATS
        if "packed_matmul" not in file.parts
        for _, name in imported(ast.parse(file.read_text()))
        if name.rpartition(".")[2] in CONCRETE
    }
    assert naming == NAMES_A_FORMAT


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """Returns modules, or rooms, that import each other in a circle; [] where none do."""
    graph: dict[str, set[str]] = {}
    for importer, name in edges:
        graph.setdefault(importer, set()).add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def edges() -> set[tuple[str, str]]:
    """Pairs of files of which the first imports the second, inside functions too."""
    modules = {module_of(file).removesuffix(".__init__"): file for file in FILES}
    found = set()
    for own, file in modules.items():
        for _, name in imported(ast.parse(file.read_text())):
            while name and name not in modules:  # a function's name, say
                name = name.rpartition(".")[0]
            if name and name != own:
                found.add((own, name))
    return found


def test_rooms_do_not_import_each_other_in_a_circle(edges):
    rooms = {(room(a), room(b)) for a, b in edges}
    assert len(rooms) > len(LAYERS)
    assert not circle({(a, b) for a, b in rooms if a and b and a != b})


def test_files_do_not_import_each_other_in_a_circle(edges):
    assert len(edges) > len(FILES)
    assert not circle(edges)


def test_a_circle_is_found():
    assert circle({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")})
    assert not circle({("a", "b"), ("b", "c"), ("a", "c")})


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


def test_no_module_hides_a_public_name():
    parts = [module_of(file).split(".") for file in FILES]
    modules = {name[1] for name in parts if name[0] == "qlora_jax"}
    assert "inference" in modules and not modules & set(dir(qlora_jax))


def test_type_checkers_see_every_public_name():
    stub = ast.parse(Path(qlora_jax.__file__).with_suffix(".pyi").read_text())
    aliases = [a for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert {a.asname for a in aliases} | {"__version__"} == set(dir(qlora_jax))


PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import jax.numpy as jnp
import pallas_kernels
from pallas_kernels.formats import FORMATS, QuantizedTensor

for form in FORMATS.values():
    assert (form.quantize(jnp.ones((2, 64))).decode() == 1).all()
q = QuantizedTensor.quantize(jnp.ones((2, 64)), double_quant=False)
assert (pallas_kernels.nf4_matmul(jnp.ones((3, 64)), q) == 64).all()
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & set({BLOCKED!r}), loaded
print("fine")
"""


def test_kernels_and_formats_work_with_jax_and_numpy_alone():
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
