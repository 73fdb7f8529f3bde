"""The package as users get it: its wheel, installed, with nothing else and no network."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import qlora_jax

ROOT = Path(__file__).parents[1]
REFUSE = """
import socket

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise AssertionError(f"a connection to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""
"""A sitecustomize.py: what a process runs before anything else."""


def quiet(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_network() -> list[str]:
    """A command before others that takes the network away, where that is allowed."""
    try:
        tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return ["unshare", "-rn"] if tried.returncode == 0 else []


def tracked() -> list[str]:
    """The files of the repository that a wheel is made of."""
    listed = quiet("git", "ls-files", cwd=ROOT).split()
    tops = ("qlora_jax/", "pallas_kernels/", "pyproject.toml", "README.md", "LICENSE")
    return [name for name in listed if name.startswith(tops)]


@pytest.mark.slow
def test_the_wheel_has_all_that_it_needs_and_asks_no_network(tmp_path: Path):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists():
        # Only git says which files the wheel may be built from.
        pytest.skip("not in a clone of the repository")
    source, dist = tmp_path / "source", tmp_path / "dist"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    dist.mkdir()
    build = (
        "from setuptools.build_meta import build_wheel as b; import sys; b(sys.argv[1])"
    )
    place = str(Path(setuptools.__file__).parents[1])
    quiet(sys.executable, "-c", build, dist, cwd=source, PYTHONPATH=place)
    (wheel,) = dist.glob("qlora_jax-*.whl")

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(quiet(python, "-c", where, cwd=tmp_path).strip())
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    # Whatever is no code has to be named in pyproject.toml to be in it.
    packages = {n for n in tracked() if n.startswith(("qlora_jax/", "pallas_kernels/"))}
    left_out = {n for n in packages - set(names) if not n.endswith(".md")}
    assert not left_out
    # Dependencies are those of the tests; a path in a .pth brings no project that is
    # installed there for editing.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (site / "sitecustomize.py").write_text(REFUSE)
    env = {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path / "home")}
    env |= {"MPLCONFIGDIR": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}
    qlora = [*without_network(), python, "-m", "qlora_jax.cli.main"]
    place = "import qlora_jax; print(qlora_jax.__file__, qlora_jax.__version__)"
    file, version = quiet(python, "-c", place, cwd=tmp_path, **env).split()
    assert Path(file).is_relative_to(site) and version == qlora_jax.__version__
    assert json.loads(quiet(*qlora, "doctor", cwd=tmp_path, **env).splitlines()[-1])
    run = ("quickstart", "--max-steps", "3", "--out", "run")
    said = json.loads(quiet(*qlora, *run, cwd=tmp_path, **env).splitlines()[-1])
    assert said["steps"] == 3 and (tmp_path / "run" / "report.html").is_file()
    verified = quiet(*qlora, "inspect", "run", "--verify", cwd=tmp_path, **env)
    assert json.loads(verified.splitlines()[-1])["files"] > 5
    assert {p.name for p in tmp_path.iterdir()} <= {
        *("source", "dist", "venv", "home", "run")
    }
