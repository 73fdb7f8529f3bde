"""Run checkpoints: adapter, optimizer state and position; never the base.

Orbax writes each into a temporary folder and renames it, so that a killed run leaves
whole checkpoints only.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import CheckpointError, ConfigError, gathered
from qlora_jax.train.older_state import older, regrouped
from qlora_jax.train.state import TrainState


class RunCheckpoints:
    """The checkpoints of one run folder.

    Each keeps a TrainState, and a position: the seed and what else has to be the same for
    the run to go on exactly, to be compared.
    """

    def __init__(self, folder: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Saves a run's state; a checkpoint of that step is kept as it is.

        Args:
          state: What the run is now.
          position: What a run that goes on from here has to have in common with this one.
        """
        if state.step == self.latest:
            return
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                adapter=ocp.args.StandardSave(flatten(state.lora)),
                optimizer=ocp.args.StandardSave(_leaves(state.opt_state)),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(self, fresh: TrainState, position: dict[str, Any]) -> TrainState:
        """Restores the newest checkpoint.

        Args:
          fresh: A run's state before its first step, for the wanted structure; arrays
            return to where its arrays are.
          position: What was given to `save`, to be compared.

        Raises:
          CheckpointError: there is no checkpoint, or it is of another run.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(
                f"{self._manager.directory} has no checkpoint to resume from; the run was "
                "stopped before its first --train.save-every; start it anew"
            )
        # Before the arrays: those of another run may have other names and shapes.
        stored = self._manager.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        )["position"]
        _check_same_run(step, _as_written_now(stored), position)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def abstract(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

        stacks = self._stacks(step, fresh)
        wanted = flatten(fresh.lora), _leaves(stacks)
        adapter, optimizer = jax.tree.map(abstract, wanted)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                adapter=ocp.args.StandardRestore(adapter),
                optimizer=ocp.args.StandardRestore(optimizer),
            ),
        )
        arrays = [x for _, x in sorted(restored["optimizer"].items())]
        opt_state = jax.tree.structure(stacks).unflatten(arrays)
        if stacks is not fresh.opt_state:
            opt_state = regrouped(opt_state, fresh.opt_state)
        opt_state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), opt_state, fresh.opt_state
        )
        lora = unflatten(restored["adapter"], fresh.lora, f"checkpoint {step}")
        return TrainState(step, lora, opt_state)

    def _stacks(self, step: int, fresh: TrainState) -> Any:
        """Returns the optimizer's state, in the shapes that a checkpoint has it in.

        Raises:
          CheckpointError: it has neither a run's of now nor an older one's.
        """
        folder = Path(self._manager.directory) / str(step) / "optimizer"
        with ocp.StandardCheckpointer() as checkpointer:
            stored: Any = checkpointer.metadata(folder).item_metadata
        shapes = [tuple(x.shape) for _, x in sorted(dict(stored.tree).items())]
        if shapes == [x.shape for x in jax.tree.leaves(fresh.opt_state)]:
            return fresh.opt_state
        if (before := older(fresh.opt_state, shapes)) is not None:
            return before
        raise CheckpointError(
            f"checkpoint {step} has an optimizer state of other shapes, as a version of "
            "qlora_jax that grouped this model's layers otherwise wrote it; go on with that "
            "version, or start a new run"
        )

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _as_written_now(position: dict[str, Any]) -> dict[str, Any]:
    """Returns a stored position as this version writes it.

    Older runs had no objective, wrote names of modules as one text, and had fewer settings of
    an adapter; what they lacked has its default. Settings that this version does not know stay
    as they are.
    """
    position = {"objective": "sft"} | position
    try:
        lora = LoRAConfig.from_json(position["lora"])
    except (KeyError, TypeError, ConfigError):
        return position
    return position | {"lora": lora.as_json()}


def _check_same_run(step: int, stored: dict, position: dict) -> None:
    """Refuses a checkpoint of a run with another position, with what differs."""
    if stored == position:
        return
    names = sorted(
        name
        for name in stored.keys() | position.keys()
        if stored.get(name) != position.get(name)
    )
    raise CheckpointError(
        gathered(
            f"checkpoint {step} belongs to another run",
            [
                f"{name}: it has {stored.get(name)!r}, the config says "
                f"{position.get(name)!r}"
                for name in names
            ],
        )
    )


def _leaves(opt_state: Any) -> dict[str, Any]:
    # By position: an optax state's own keys are not all names that Orbax can write.
    return {_name(i): x for i, x in enumerate(jax.tree.leaves(opt_state))}


def _name(i: int) -> str:
    return f"{i:05d}"
