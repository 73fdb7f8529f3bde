"""The house in figures: how large its rooms, files and functions are, tree beside tree.

    python -m scripts.make.house                # the files here
    python -m scripts.make.house 4444525 HEAD . # two commits, and the files here

Lines are all lines of Python files. A function's lines are those from its `def` to its end,
functions inside it too. What is counted in the library is counted in qlora_jax and
pallas_kernels.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

from scripts.bench.harness import ROOT

LIBRARY = ("qlora_jax", "pallas_kernels")
PACKAGES = (*LIBRARY, "scripts", "tests")
LONG_FILE = 450
LONG_FUNCTIONS = (60, 80)


def sources(tree: str) -> dict[str, str]:
    """Returns {path: text} of the Python files of a folder or a commit."""
    if Path(tree).is_dir():
        root = Path(tree)
        files = [f for p in PACKAGES for f in sorted((root / p).rglob("*.py"))]
        return {f.relative_to(root).as_posix(): f.read_text() for f in files}
    asked = ["git", "archive", "--format=tar", tree]
    packed = subprocess.run(asked, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        return {
            member.name: files.extractfile(member).read().decode()
            for member in files
            if member.name.endswith(".py") and member.name.split("/")[0] in PACKAGES
        }


def spells_layers(tree: ast.AST) -> bool:
    """Returns whether a file has the stack's name in a string that is a parameter's."""
    return any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and "layers" in node.value.split(".")
        for node in ast.walk(tree)
    )


def figures(files: dict[str, str]) -> dict[str, int]:
    """Returns what is counted of a tree, in the order in which it is printed."""
    rooms: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for path, text in files.items():
        package, *rest = path.split("/")
        lines = len(text.splitlines())
        rooms[package] += lines
        if len(rest) > 1 and package != "tests":
            rooms[f"{package}/{rest[0]}"] += lines
        where = "library" if package in LIBRARY else package
        found[f"{where}: files over {LONG_FILE} lines"] += lines > LONG_FILE
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                for limit in LONG_FUNCTIONS:
                    found[f"{where}: functions over {limit} lines"] += size > limit
            elif where == "library" and isinstance(node, ast.Name):
                for name in ("isinstance", "Any"):
                    found[f"library: {name}"] += node.id == name
        if where == "library":
            found['library: files that spell "layers"'] += spells_layers(tree)
    named = {f"lines of {room}": count for room, count in sorted(rooms.items())}
    return named | dict(sorted(found.items()))


def main() -> None:
    """Prints a table, a column a tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trees", nargs="*", default=[str(ROOT)], help="folders or commits of this clone"
    )
    args = parser.parse_args()
    columns = [figures(sources(tree)) for tree in args.trees]
    names = dict.fromkeys(name for column in columns for name in column)
    print(f"{'':44}" + "".join(f"{tree[-12:]:>13}" for tree in args.trees))
    for name in sorted(names, key=lambda name: not name.startswith("lines of")):
        print(f"{name:44}" + "".join(f"{c.get(name, 0):13,}" for c in columns))


if __name__ == "__main__":
    main()
