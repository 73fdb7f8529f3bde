"""The qlora command, run in this process."""

import json

from qlora_jax.cli.main import main


def call(capsys, *args: object) -> dict:
    """Runs a command that must work; returns its figures, and all of stdout as 'table'."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.splitlines()[-1]) | {"table": out}


def refused(capsys, *args: object) -> str:
    """Runs a command that must fail as wrong input; returns the message."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:  # tyro's own, for flags it cannot parse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    return error
