"""README and docs/ name flags, settings and Python names that exist."""

import contextlib
import dataclasses
import functools
import importlib
import io
import re
import typing
from pathlib import Path
from typing import Any

import pytest

import qlora_jax as qlora
from qlora_jax.cli.main import COMMANDS
from qlora_jax.config.run import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")
OTHERS = {"--debug", "--offline", "--no-compile-cache", "--help", "--max-steps"}
OTHERS |= {"--signal", "--requeue", "--open-mode", "--xla"}
"""Flags that are the command's own, those of scripts, Slurm's, and how XLA's begin."""


@functools.cache
def flags() -> frozenset[str]:
    """Returns the flags of all subcommands."""
    found = set(OTHERS)
    for name in COMMANDS:
        module = importlib.import_module(
            f"qlora_jax.cli.{'import_' if name == 'import' else name}"
        )
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            module.parse(["--help"], f"qlora {name}")
        found.update(FLAG.findall(out.getvalue()))
    return frozenset(found)


def ours(page: Path) -> str:
    """Returns a page's text without what it says of other tools."""
    text = page.read_text(encoding="utf-8")
    if page.name != "migrating.md":
        return text
    cells = [line.split(" | ")[1:] for line in text.splitlines() if line[:2] == "| "]
    rest = [line for line in text.splitlines() if line[:2] != "| "]
    return "\n".join([*rest, *(" | ".join(cell) for cell in cells)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page: Path):
    named = set(FLAG.findall(ours(page)))
    known = flags()
    assert "--train.offload" in known
    assert not {flag for flag in named if flag not in known}


def settings(cls: Any) -> dict[str, Any]:
    """Returns the tables and keys of a run's TOML."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: settings(hints[field.name])
        if dataclasses.is_dataclass(hints[field.name])
        else None
        for field in dataclasses.fields(cls)
    }


def test_every_setting_of_the_toml_tables_exists():
    known = settings(RunConfig)
    text = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    section = text.partition("## From axolotl")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[1] for line in section.splitlines() if line[:3] == "| `"]
    checked = 0
    for cell in cells:
        for table, names in re.findall(r"`\[(\w+)\] ((?:[^|]*?))(?=;|\||$)", cell):
            for name in re.findall(r"(?:^|`)(\w+)", names):
                assert name in known[table], (cell, name)
                checked += 1
    assert checked > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_name_and_link_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bqlora\.([a-zA-Z_]+)\b", text):
        assert name in ("py", "toml") or hasattr(qlora, name), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Za-z_0-9]+)`", text))
    assert {name for name in dir(qlora) if name[0] != "_"} <= named
    assert all(hasattr(qlora, n) for n in named - {"qlora"})
