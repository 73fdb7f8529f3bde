"""An objective by its settings: one of ours, or one of the user's own."""

import dataclasses
import importlib
from collections.abc import Callable

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.errors import ConfigError
from qlora_jax.objectives import distill, dpo, kto, orpo, sft, simpo
from qlora_jax.objectives.base import Objective

OURS: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "sft": sft.make,
    "dpo": dpo.make,
    "orpo": orpo.make,
    "kto": kto.make,
    "simpo": simpo.make,
    "distill": distill.make,
}


def make_objective(config: ObjectiveConfig) -> Objective:
    """Returns the objective that settings name.

    Raises:
      ConfigError: there is none of that name, its module cannot be imported, or what the
        name stands for is no Objective.
    """
    if config.name in OURS:
        made = OURS[config.name](config)
        return dataclasses.replace(made, settings=config.settings)
    return _imported(config.name)


def _imported(name: str) -> Objective:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(
            f"--objective is {name!r}, expected {', '.join(OURS)}, or "
            "package.module:name of an Objective of your own"
        )
    where = f"--objective {name}"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"{where}: importing {module} failed with {type(error).__name__}: {error}. "
            "Its folder has to be on Python's path, as PYTHONPATH=FOLDER puts it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"{where}: {module} has no {attribute}; {_objectives_of(module)}"
            )
        found = getattr(found, part)
    if not isinstance(found, Objective):
        raise ConfigError(
            f"{where} is of type {type(found).__name__}, expected an Objective, such as "
            "qlora_jax.objectives.of_hidden_states(name, function) makes; "
            f"{_objectives_of(module)}"
        )
    return found


def _objectives_of(module: str) -> str:
    values = vars(importlib.import_module(module))
    names = [name for name, value in values.items() if isinstance(value, Objective)]
    return f"its objectives are {', '.join(names)}" if names else "it has no objective"
