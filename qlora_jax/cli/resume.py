"""`qlora train --resume RUN`: what the run was, and what of it may change."""

import dataclasses
import datetime
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.config.run import FILE, RunConfig, as_written_now, has_run, read_run
from qlora_jax.config.train import MAY_CHANGE, ROUNDS, TrainConfig
from qlora_jax.errors import CheckpointError, ConfigError, OutputExistsError, gathered
from qlora_jax.exchange.steps import (
    BEGUN,
    CHECKPOINTS,
    END,
    newest,
    read_position,
    steps,
)
from qlora_jax.toml import read_toml
from qlora_jax.train.optimizer import make_schedule

MOVED = ("model", "original", "data_file", "eval_file")
"""Settings that say where something is; by digest it has to be what it was."""
_FLAGS = {"data_file": "data", "eval_file": "eval-data"}


def command(out: Path) -> str:
    """Returns the command that goes on with a run."""
    return f"qlora train --resume {shlex.quote(str(out))}"


def refuse_taken(out: Path) -> None:
    """Refuses to begin a run where another one is, with the command that goes on with that.

    Raises:
      OutputExistsError: there is one.
    """
    if not has_run(out):
        return
    taken = steps(out / CHECKPOINTS)
    if not taken:
        raise OutputExistsError(
            f"{out} holds a run without a checkpoint; start it anew with --overwrite, or "
            "choose another --out"
        )
    try:
        end = read_position(out / CHECKPOINTS / str(taken[-1])).get(END)
    except CheckpointError:  # damaged: --resume says more
        end = None
    if taken[-1] == end:
        raise OutputExistsError(
            f"{out} holds a finished run of {end} steps, and is not empty; choose another "
            f"--out, or pass --overwrite to replace it. For more steps: {command(out)} "
            "--train.max-steps N"
        )
    raise OutputExistsError(
        f"{out} holds an unfinished run, of which step {taken[-1]} of {end or '?'} is saved. "
        f"To go on with it: {command(out)}. To start anew, pass --overwrite or choose another "
        "--out"
    )


def settings(out: Path) -> tuple[RunConfig, RunConfig, str]:
    """Returns the settings of a run that is to go on, those that it had, and when it began.

    The first are config.toml's, the second those of the newest whole checkpoint; where an
    older version wrote that, or there is none, they are config.toml's too, and it begins now.

    Raises:
      ConfigError: config.toml cannot be used, or lacks settings that the run had.
      CheckpointError: all checkpoints are damaged.
    """
    folder, _ = newest(out / CHECKPOINTS)  # what is damaged is said when it is restored
    if folder is None or not has_run(folder):
        return read_run(out), read_run(out), datetime.datetime.now().isoformat()
    way_out = f"{folder / FILE} has them as they were saved; copy it to {out / FILE}"
    try:
        now = read_run(out)
    except ConfigError as error:
        raise ConfigError(f"{error}. {way_out}") from None
    before, there = (
        flat(as_written_now(read_toml(place / FILE))) for place in (folder, out)
    )
    if lacking := before.keys() - there.keys():
        problems = [f"{name} (it was {before[name]!r})" for name in sorted(lacking)]
        what = f"{out / FILE} lacks settings that the run had, so it was cut or edited"
        raise ConfigError(f"{gathered(what, problems)}\n{way_out}")
    return now, read_run(folder), _begun(folder)


def _begun(folder: Path) -> str:
    """Returns when a run was begun, which templates may have written into its rows."""
    begun = read_position(folder).get(BEGUN)
    return begun if isinstance(begun, str) else datetime.datetime.now().isoformat()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by their dotted names."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and not prefix.count("."):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def check_changes(out: Path, before: RunConfig, now: RunConfig) -> list[str]:
    """Refuses settings that would make another run.

    Returns:
      What the others mean for exactness, a line each.

    Raises:
      ConfigError: those that would make another run; all are named.
    """
    old, new = flat(dataclasses.asdict(before)), flat(dataclasses.asdict(now))
    problems, said = [], []
    for name in old | new:
        if old.get(name) == new.get(name):
            continue
        change = (
            f"{_flag(name)} is {_text(new.get(name))}, it was {_text(old.get(name))}"
        )
        if (meaning := _meaning(name, now)) is None:
            problems.append(change)
        else:
            said.append(f"{change}: {meaning}")
    rows = [c.train.micro_batch * c.train.grad_accum for c in (before, now)]
    if rows[0] != rows[1]:
        problems.append(
            f"micro-batch times grad-accum is {rows[1]} rows a step, it was {rows[0]}"
        )
    if problems:
        what = f"{out} cannot go on with settings that make another run; start one with --out"
        raise ConfigError(gathered(what, problems))
    return said


def _meaning(name: str, now: RunConfig) -> str | None:
    """Says what another value of a setting means for a run that goes on; None if it may not."""
    if name == "memory":
        return "it is a limit alone, so the run stays bit-equal"
    if name in MOVED:
        return "what is read from there has to be what it was, by digest"
    table, _, field = name.partition(".")
    if name == "objective.precompute_reference":
        return ROUNDS
    if table != "train" or field not in MAY_CHANGE:
        return None
    if field in ("micro_batch", "grad_accum") and now.objective.name == "kto":
        return None  # its KL is estimated for each micro-batch
    if field in ("micro_batch", "grad_accum") and now.lora.dropout:
        return f"{MAY_CHANGE[field]}; and dropout is drawn for each micro-batch anew"
    return MAY_CHANGE[field]


def _flag(name: str) -> str:
    return "--" + _FLAGS.get(name, name.replace("_", "-"))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def other_end(
    before: TrainConfig, now: TrainConfig, of_epochs: Callable[[float], int], start: int
) -> str | None:
    """Says what another last step means for the steps from `start` on.

    Args:
      before: The settings of the run as it was.
      now: Those that it goes on with.
      of_epochs: See `TrainConfig.steps`.
      start: Steps that were taken.

    Returns:
      None where the run ends where it would have.

    Raises:
      ConfigError: the run is beyond that step already.
    """
    ends = before.steps(of_epochs), now.steps(of_epochs)
    if ends[0] == ends[1]:
        return None
    if ends[1] < start:
        raise ConfigError(
            f"--train.max-steps: the run would end at step {ends[1]}, and its checkpoint is of "
            f"step {start}"
        )
    taken = np.arange(start, min(ends))
    rates = [
        np.broadcast_to(make_schedule(config, end)(taken), taken.shape)
        for config, end in zip((before, now), ends, strict=True)
    ]
    text = f"the run ends at step {ends[1]}, not {ends[0]}"
    differ = np.flatnonzero(rates[0] != rates[1])
    if not differ.size:
        same = "so the run stays bit-equal"
        return f"{text}; the learning rate of no step up to {min(ends)} changes, {same}"
    first = int(differ[0])
    return (
        f"{text}; the schedule is that of {ends[1]} steps from here on: step "
        f"{start + first + 1} has a learning rate of {rates[1][first]:.4g}, not "
        f"{rates[0][first]:.4g}, so later steps are bit-equal to no run begun with either"
    )
