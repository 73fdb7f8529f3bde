"""Run checkpoints: adapter, optimizer state and position; never the base.

Each is written beside, by a thread of its own, flushed to the disk and renamed to its step;
only then do older ones go. So a kill or a power cut leaves older checkpoints as they were.
`qlora_jax.exchange.steps` says what is in one, and how it proves that it is whole.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax import digests
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.disk import check_room
from qlora_jax.errors import CheckpointError, SaveError, first_line
from qlora_jax.exchange.steps import (
    DIGESTS,
    POSITION,
    best,
    damage,
    none_whole,
    read_position,
    say_damaged,
    steps,
)
from qlora_jax.files import sync, sync_tree
from qlora_jax.train.older_state import older, regrouped
from qlora_jax.train.position import check_same_run
from qlora_jax.train.state import TrainState

logger = logging.getLogger(__name__)

Beside = Callable[[Path, Mapping[str, np.ndarray]], None]
"""(folder, the adapter's arrays by name): writes what lies beside a checkpoint's arrays."""

ADAPTER, OPTIMIZER = "adapter", "optimizer"
_PARTIAL = ".partial"
_ORBAX_PARTIAL = ".orbax-checkpoint-tmp"
"""What the names of unfinished checkpoints of this version, and of older ones, have."""


class RunCheckpoints:
    """The checkpoints of one run folder.

    Each keeps a TrainState, and a position: the seed and what else has to be the same for
    the run to go on exactly, to be compared.
    """

    def __init__(self, folder: Path, keep: int):
        """Opens a folder of checkpoints, which need not be there; nothing is written.

        Args:
          folder: The folder.
          keep: So many of the newest are kept, and besides the one of the least eval loss.
        """
        self.folder, self._keep = Path(folder).absolute(), keep
        self._damaged: set[int] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._saved: int | None = None

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, of those that are not known to be damaged."""
        self.wait()
        return max(self._whole(), default=None)

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and the eval loss of the checkpoint that has the least."""
        self.wait()
        return best(self.folder, self._whole())

    def _whole(self) -> list[int]:
        return [step for step in steps(self.folder) if step not in self._damaged]

    def save(
        self,
        state: TrainState,
        position: dict[str, Any],
        *,
        beside: Beside | None = None,
    ) -> None:
        """Saves a run's state; a whole checkpoint of that step is kept as it is.

        The state is copied to host memory; the rest is done by a thread while the run goes
        on, until the next `save` or `wait`.

        Args:
          state: What the run is now.
          position: What a run that goes on from here has to have in common with this one.
          beside: Writes more into the folder.

        Raises:
          SaveError: the checkpoint before could not be written.
        """
        self.wait()
        if state.step == self._saved or state.step in self._whole():
            return
        # The next step takes these arrays' memory, which numpy would only look at.
        arrays = {
            ADAPTER: {name: np.array(x) for name, x in flatten(state.lora).items()},
            OPTIMIZER: {name: np.array(x) for name, x in _leaves(state).items()},
        }
        self._saved = state.step
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._saving = self._thread.submit(
            self._write, state.step, arrays, position, beside
        )

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          SaveError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check(self) -> None:
        """Raises SaveError if a checkpoint could not be written; waits for none."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def _write(
        self,
        step: int,
        arrays: dict[str, dict[str, np.ndarray]],
        position: dict[str, Any],
        beside: Beside | None,
    ) -> None:
        partial = self.folder / f"{step}{_PARTIAL}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync(self.folder.parent)
                sync(self.folder.parents[1])
            self._sweep()
            partial.mkdir()
            leaves = [x for values in arrays.values() for x in values.values()]
            check_room(partial, sum(x.nbytes for x in leaves))
            for item, values in arrays.items():
                _write_arrays(partial / item, values)
            found = {
                item: {name: digests.of_array(x) for name, x in values.items()}
                for item, values in arrays.items()
            }
            (partial / POSITION).parent.mkdir()
            text = json.dumps({**position, DIGESTS: found}, allow_nan=False)
            (partial / POSITION).write_text(text, encoding="utf-8")
            if beside is not None:
                beside(partial, arrays[ADAPTER])
            digests.write(partial, {})
            sync_tree(partial)
            self._make_room(step)
            partial.rename(self.folder / str(step))
            sync(self.folder)
        # Orbax and TensorStore raise errors of every kind; a full disk is a ValueError there.
        except Exception as error:
            # What cannot be removed now, the next save sweeps; the error itself says more.
            shutil.rmtree(partial, ignore_errors=True)
            whole = self._whole()
            left = (
                f"Checkpoint {max(whole)} is whole; see to that, then resume the run"
                if whole
                else "There is none before it; see to that, then begin the run again"
            )
            raise SaveError(
                f"checkpoint {step} could not be written into {self.folder}: "
                f"{first_line(error)}. {left}"
            ) from error
        self._prune(step)

    def _sweep(self) -> None:
        """Removes what a killed save left."""
        for path in self.folder.iterdir():
            name, _, _ = path.name.partition(".")
            if path.is_dir() and name.isdigit():
                if path.name.endswith(_PARTIAL) or _ORBAX_PARTIAL in path.name:
                    shutil.rmtree(path)

    def _make_room(self, step: int) -> None:
        """Moves a damaged checkpoint of a step away; the next sweep or prune removes it."""
        if (there := self.folder / str(step)).exists():
            there.rename(self.folder / f"{step}.damaged{_PARTIAL}")
        self._damaged.discard(step)

    def _prune(self, step: int) -> None:
        """Removes what is not to be kept, once a newer checkpoint is on the disk."""
        whole = self._whole()
        kept = {*whole[-self._keep :], step}
        if (least := best(self.folder, whole)) is not None:
            kept.add(least[0])
        try:
            for old in {*whole, *self._damaged} - kept:
                there = self.folder / str(old)
                if (there / POSITION.parent).is_dir():  # else someone else's
                    there.rename(self.folder / f"{old}.old{_PARTIAL}")  # at one stroke
            self._sweep()
        except OSError as error:
            logger.warning("an older checkpoint could not be removed: %s", error)

    def restore(
        self,
        fresh: TrainState,
        position: dict[str, Any],
        *,
        may_differ: frozenset[str] = frozenset(),
    ) -> TrainState:
        """Restores the newest checkpoint that is whole.

        Newer ones that are damaged are named, as a warning, and removed when the next
        checkpoint is on the disk. Where none is, what a killed process left goes now.

        Args:
          fresh: A run's state before its first step, for the wanted structure; arrays
            return to where its arrays are.
          position: What was given to `save`, to be compared.
          may_differ: Names of the position that are not compared.

        Raises:
          CheckpointError: there is no checkpoint, none is whole, or it is of another run.
        """
        self.wait()
        problems: list[str] = []
        for step in reversed(steps(self.folder)):
            folder = self.folder / str(step)
            found = damage(folder)
            if not found:
                stored = read_position(folder)
                check_same_run(step, stored, position, may_differ)
                try:
                    state = _restore(folder, step, fresh, stored)
                except _DamagedError as error:
                    found = error.problems
                else:
                    say_damaged(folder, problems)
                    if not self._damaged:
                        # A process may have been killed before it came to this, and a run
                        # that has taken its last step saves no more.
                        self._prune(step)
                    if not (folder / digests.NAME).exists():
                        logger.warning(
                            "checkpoint %d is of a version that wrote no digests, so its "
                            "arrays are used unchecked",
                            step,
                        )
                    return state
            problems += [f"{step}: {problem}" for problem in found]
            self._damaged.add(step)
        if problems:
            raise none_whole(self.folder, problems)
        raise CheckpointError(
            f"{self.folder} has no checkpoint to resume from; the run was stopped before its "
            "first step was saved (--train.save-every); start it anew"
        )

    def close(self, failed: bool = False) -> None:
        """Waits for what is being saved, and ends the thread.

        Args:
          failed: The run has an error of its own, so one of saving is only logged.
        """
        try:
            self.wait()
        except SaveError as error:
            if not failed:
                raise
            logger.warning("%s", error)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


class _DamagedError(Exception):
    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems


def _restore(
    folder: Path, step: int, fresh: TrainState, position: dict[str, Any]
) -> TrainState:
    """Reads the arrays of a checkpoint and compares them with their digests."""
    stacks = _stacks(folder, step, fresh)
    wanted = {ADAPTER: flatten(fresh.lora), OPTIMIZER: _named(jax.tree.leaves(stacks))}
    read = {item: _read_arrays(folder / item, wanted[item]) for item in wanted}
    expected = position.get(DIGESTS)
    if expected is not None:
        problems = [
            f"{item}: array {name} is not as it was written (its sha256 differs)"
            for item, arrays in read.items()
            for name, x in arrays.items()
            if digests.of_array(x) != expected[item].get(name)
        ]
        if problems:
            raise _DamagedError(problems)
    arrays = [x for _, x in sorted(read[OPTIMIZER].items())]
    opt_state = jax.tree.structure(stacks).unflatten(arrays)
    if stacks is not fresh.opt_state:
        opt_state = regrouped(opt_state, fresh.opt_state)
    opt_state = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), opt_state, fresh.opt_state
    )
    lora = unflatten(read[ADAPTER], fresh.lora, f"checkpoint {step}")
    return TrainState(step, lora, opt_state)


def _stacks(folder: Path, step: int, fresh: TrainState) -> Any:
    """Returns the optimizer's state, in the shapes that a checkpoint has it in.

    Raises:
      CheckpointError: it has neither a run's of now nor an older one's.
    """
    shapes = [shape for _, shape in sorted(_stored_shapes(folder / OPTIMIZER).items())]
    if shapes == [x.shape for x in jax.tree.leaves(fresh.opt_state)]:
        return fresh.opt_state
    if (before := older(fresh.opt_state, shapes)) is not None:
        return before
    raise CheckpointError(
        f"checkpoint {step} has an optimizer state of other shapes, as a version of "
        "qlora_jax that grouped this model's layers otherwise wrote it; go on with that "
        "version, or start a new run"
    )


def _write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(dict(arrays)))


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored: Any = checkpointer.metadata(folder).item_metadata
        return {name: tuple(x.shape) for name, x in dict(stored.tree).items()}
    except Exception as error:  # Orbax raises of every kind, Exception itself too
        raise _unreadable(folder, error) from None


def _read_arrays(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
        for name, x in wanted.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, shapes)
    except Exception as error:  # Orbax raises of every kind, Exception itself too
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> _DamagedError:
    return _DamagedError([f"{folder.name}/ cannot be read: {first_line(error)}"])


def _leaves(state: TrainState) -> dict[str, Any]:
    return _named(jax.tree.leaves(state.opt_state))


def _named(leaves: list[Any]) -> dict[str, Any]:
    # By place: an optax state's own keys are not all names that Orbax can write.
    return {f"{i:05d}": x for i, x in enumerate(leaves)}
