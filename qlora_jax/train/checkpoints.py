"""Run checkpoints: adapter, optimizer state and position; never the base.

Orbax writes each into a temporary folder and renames it, so that a killed run leaves
whole checkpoints only.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import CheckpointError, ConfigError, gathered


class RunCheckpoints:
    """The checkpoints of one run folder.

    Position is the step: the data order, dropout keys and schedule follow from seed and
    step, so nothing else need be kept. The seed is kept to be compared.
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

    def save(self, step: int, lora: nnx.State, opt_state: Any, position: dict) -> None:
        """Saves after `step` steps; a checkpoint of that step is kept as it is."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                adapter=ocp.args.StandardSave(flatten(lora)),
                optimizer=ocp.args.StandardSave(_leaves(opt_state)),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(
        self, lora: nnx.State, opt_state: Any, position: dict
    ) -> tuple[int, nnx.State, Any]:
        """Restores the newest checkpoint.

        Args:
          lora: With the wanted structure.
          opt_state: A fresh one; arrays return to where its arrays are.
          position: What was given to `save`, to be compared.

        Returns:
          (steps done, lora, opt_state).

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
        stored = _as_written_now(stored)
        if stored != position:
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
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def abstract(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                adapter=ocp.args.StandardRestore(jax.tree.map(abstract, flatten(lora))),
                optimizer=ocp.args.StandardRestore(
                    jax.tree.map(abstract, _leaves(opt_state))
                ),
            ),
        )
        fresh, structure = jax.tree.flatten(opt_state)
        leaves = [restored["optimizer"][f"{i:05d}"] for i in range(len(fresh))]
        placed = [
            jax.device_put(x, y.sharding) for x, y in zip(leaves, fresh, strict=True)
        ]
        lora = unflatten(restored["adapter"], lora, f"checkpoint {step}")
        return step, lora, jax.tree.unflatten(structure, placed)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _as_written_now(position: dict[str, Any]) -> dict[str, Any]:
    """Returns a stored position with its adapter's settings as this version writes them.

    Older runs wrote names as one text, and had fewer settings; what they lacked has its
    default. Settings that this version does not know stay as they are.
    """
    try:
        lora = LoRAConfig.from_json(position["lora"])
    except (KeyError, TypeError, ConfigError):
        return position
    return position | {"lora": lora.as_json()}


def _leaves(opt_state: Any) -> dict[str, Any]:
    # By position: an optax state's own keys are not all names that Orbax can write.
    return {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(opt_state))}
