"""What is left over at the command's end: one line, and the right status."""

import errno
import os

import pytest

from qlora_jax.cli import doctor
from qlora_jax.cli.main import main
from qlora_jax.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    SaveError,
)
from qlora_jax.sources import hub
from qlora_jax.train.loop import DivergedError


class PanicException(BaseException):
    """The package tokenizers raises one of this name, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            TypeError("a\nb"),
            "this is a fault of qlora_jax (TypeError: a b); please report",
        ),
        (RecursionError("deep"), "this is a fault of qlora_jax (RecursionError: deep)"),
        (
            PanicException("index"),
            "this is a fault of qlora_jax (PanicException: index)",
        ),
        (MemoryError(), "this machine's memory is used up (MemoryError)"),
    ],
)
def test_what_nobody_expected_is_one_line(error, message, monkeypatch, capsys):
    def run(_):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 1
    assert out == ""
    assert main(["doctor", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (CheckpointError("x"), 2),
        (OutputExistsError("x"), 2),
        (LockedError("x"), 2),
        (FileNotFoundError("x"), 2),
        (OutputError("x"), 1),
        (SaveError("x"), 1),
        (OutOfMemoryError("x"), 1),
        (DivergedError("x"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_what_is_wrong_with_what_was_given_is_2_and_what_let_it_down_1(
    error, status, monkeypatch, capsys
):
    def run(_):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_ctrl_c_and_the_end_of_parsing_are_no_faults(monkeypatch, capsys):
    def run(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 130
    assert "fault" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--no-such-flag"])


def test_offline_is_said_to_all_that_ask_the_network(monkeypatch, capsys):
    monkeypatch.setenv(hub.OFFLINE, "0")
    seen = []

    def run(_):
        seen.append((os.environ["HF_HUB_OFFLINE"], hub.offline()))
        return {}

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == main(["doctor", "--offline"]) == 0
    assert seen == [("0", False), ("1", True)]
