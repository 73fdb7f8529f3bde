"""Compiled programs on disk: where, and that nothing fails or differs because of them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qlora_jax.cli import compile_cache
from qlora_jax.cli.main import main
from qlora_jax.user_folder import cache_folder

# A process of its own: jax takes its cache folder once.
PROGRAM = textwrap.dedent(
    """
    import logging, sys
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from qlora_jax.cli.compile_cache import use_cache
    folder = use_cache()
    import jax, jax.numpy as jnp
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event.endswith("/cache_hits")))
    @jax.jit
    def square(x):
        return jnp.sin(x @ x.T).sum()
    y = float(square(jnp.arange(6.0).reshape(2, 3)))
    import json
    print(json.dumps({"y": y, "hits": sum(hits), "folder": str(folder)}))
    """
)


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    own = {
        "QLORA_JAX_COMPILE_CACHE": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    # Less the cache of the tests' own process, which would be used instead.
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= own | variables
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def end(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*square*-cache"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A cache that two processes have filled at once, and what they computed."""
    cache = tmp_path_factory.mktemp("cache") / "new"
    both = [end(process) for process in [start(cache), start(cache)]]
    assert both[0][0]["y"] == both[1][0]["y"]
    assert any("compiled programs are kept in" in err for _, err in both)
    assert not any("damaged" in err or "not kept" in err for _, err in both)
    assert len(entries(cache)) == 1
    return cache, both[0][0]


def test_a_later_process_finds_the_programs_of_an_earlier_one(
    filled: tuple[Path, dict],
):
    cache, first = filled
    figures, err = end(start(cache))
    assert figures["hits"] > 0
    assert figures["y"] == first["y"]
    assert "compiled programs" not in err  # said once, when the folder was made


def test_damaged_entries_are_said_and_compiled_again(filled: tuple[Path, dict]):
    cache, first = filled
    (entry,) = entries(cache)
    good = entry.read_bytes()
    entry.write_bytes(good[: len(good) // 2])
    figures, err = end(start(cache))
    assert figures["y"] == first["y"]
    assert "a kept program is damaged and compiled again" in err
    (entry,) = entries(cache)
    assert len(entry.read_bytes()) > len(good) // 2


def test_entries_that_were_cut_short_go_before_they_are_read(tmp_path: Path):
    (tmp_path / "a-cache").write_bytes(b"half")
    (tmp_path / "b-cache").write_bytes(b"whole")
    (tmp_path / "b-atime").write_bytes(bytes(8))
    compile_cache._remove_unfinished(tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("*-cache"))] == ["b-cache"]


def test_a_folder_that_cannot_be_made_fails_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    _no_cache_of_jax(monkeypatch)
    assert compile_cache.use_cache() is None
    assert "compiled programs are not kept" in caplog.text
    assert str(tmp_path / "file") in caplog.text


def test_a_cache_that_jax_has_already_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import jax

    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "ours"))
    before = jax.config.jax_compilation_cache_dir
    assert before  # of tests/conftest.py
    assert compile_cache.use_cache() is None
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("flag", [True, False])
def test_flag_and_variable_turn_it_off(
    flag: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    _no_cache_of_jax(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compile_cache.VARIABLE, "" if flag else "off")
    args = ["--no-compile-cache"] if flag else []
    assert main(["inspect", str(tmp_path / "none"), *args]) == 2
    assert "none" in capsys.readouterr().err  # the subcommand's error, not the flag's
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_users_unless_the_variable_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(compile_cache.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert (
        cache_folder(compile_cache.VARIABLE, "compiled")
        == tmp_path / ".cache/qlora_jax/compiled"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert (
        cache_folder(compile_cache.VARIABLE, "compiled")
        == tmp_path / "x/qlora_jax/compiled"
    )
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "named"))
    assert cache_folder(compile_cache.VARIABLE, "compiled") == tmp_path / "named"
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert cache_folder(compile_cache.VARIABLE, "compiled") is None


def test_cpus_with_other_features_have_other_folders(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    text = (
        "model name\t: One\nflags\t\t: sse avx {}\n\nmodel name\t: One\ncpu MHz\t: {}\n"
    )
    digests = []
    for features, mhz in (("avx2", 1), ("avx2", 2), ("avx2 avx512f", 1)):
        info.write_text(text.format(features, mhz))
        digests.append(compile_cache.machine_digest(info))
    assert digests[0] == digests[1] != digests[2]
    assert compile_cache.machine_digest(tmp_path / "none")  # not on Linux


def test_usage_names_flag_and_variable(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert "--no-compile-cache" in usage and compile_cache.VARIABLE in usage


def _no_cache_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes jax one that has no folder, as in a new process, and refuses to be given one."""
    import jax

    class Unset:
        jax_compilation_cache_dir = None

        def update(self, name: str, value: object) -> None:
            raise AssertionError(f"{name} was set to {value}")

    monkeypatch.setattr(jax, "config", Unset())
