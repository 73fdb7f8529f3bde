"""What a checkpoint's run and the run that goes on from it have to have in common."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.train import MAY_CHANGE, TrainConfig
from qlora_jax.data import Dataset
from qlora_jax.data.fields import REFERENCE
from qlora_jax.errors import CheckpointError, ConfigError, gathered
from qlora_jax.exchange.steps import BEGUN, DIGESTS, EVAL_LOSS
from qlora_jax.objectives import Objective

NOT_COMPARED = frozenset({DIGESTS, EVAL_LOSS, BEGUN})
ALWAYS = frozenset(
    {
        *("seed", "batch", "rows", "steps", "compute_dtype", "optimizer"),
        *("objective", "lora", "shares"),
    }
)
"""What positions had from the beginning. A name that came later is compared where both have
it: an older checkpoint does not, nor a Trainer that was given no identity."""

BY_DIGEST = {
    "data": "the rows to train on (their ids and weights) are",
    "eval_data": "the held-out rows (their ids and weights) are",
    "chat_template": "the chat template is",
    "base.config": "the base's config.json is",
    "base.weights": "the base's weights are",
    "base.tokenizer": "the base's tokenizer is",
}
"""Names whose values are digests, and what they are of."""


def identity_of(
    config: TrainConfig,
    data: Dataset,
    held: Dataset | None,
    objective: Objective,
    lora: LoRAConfig,
    packing: str,
) -> dict[str, Any]:
    """Returns what tells a run from others, as far as a Trainer knows it.

    Rows count as they are tokenized: another tokenizer or template that makes the same rows
    is no other run.
    """
    # Runs without shares wrote no more than their number of rows.
    shares = [[len(one.rows), one.weight] for one in data.shares]
    settings = dataclasses.asdict(config)
    return {
        **({"shares": shares} if shares else {}),
        "seed": config.seed,
        "batch": config.micro_batch * config.grad_accum,
        "rows": len(data),
        "compute_dtype": config.compute_dtype,
        "optimizer": config.optimizer,
        "objective": objective.name,
        **{f"objective.{name}": x for name, x in objective.settings.items()},
        "lora": lora.as_json(),
        "packing": packing,
        **{
            f"train.{name}": value
            for name, value in settings.items()
            if name not in ALWAYS | MAY_CHANGE.keys()
        },
        "data": rows_digest(data),
        "eval_data": None if held is None else rows_digest(held),
    }


def rows_digest(data: Dataset) -> str:
    """Returns the sha256, in hex, of the ids and weights of all rows, in their order, and of
    what else they have."""
    found = hashlib.sha256(f"{data.max_tokens}".encode())
    for row in data.rows:
        for one in (row,) if row.other is None else (row, row.other):
            found.update(len(one.tokens).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(one.tokens, np.int32))
            found.update(np.ascontiguousarray(one.weights, np.float32))
            # What a reference says of rows follows from them and the base.
            for name in sorted(one.extras.keys() - {REFERENCE}):
                found.update(name.encode())
                found.update(np.ascontiguousarray(one.extras[name]))
    return found.hexdigest()


def check_same_run(
    step: int,
    stored: Mapping[str, Any],
    position: Mapping[str, Any],
    may_differ: Collection[str] = (),
) -> None:
    """Compares the position of a checkpoint with that of a run.

    Args:
      step: The checkpoint's step.
      stored: Its position.
      position: The position of the run that would go on from it.
      may_differ: Names that are not compared.

    Raises:
      CheckpointError: they are of different runs; everything that differs is named.
    """
    stored = _as_written_now(stored)
    common = (stored.keys() & position.keys()) | ALWAYS
    problems = [
        _difference(name, stored.get(name), position.get(name))
        for name in sorted(common - NOT_COMPARED - {*may_differ})
        if stored.get(name) != position.get(name)
    ]
    if problems:
        raise CheckpointError(
            gathered(f"checkpoint {step} belongs to another run", problems)
        )


def _difference(name: str, before: Any, now: Any) -> str:
    if (what := BY_DIGEST.get(name)) is None:
        return f"{name}: it has {before!r}, the config says {now!r}"
    a, b = (x if x is None else f"{x[:12]}..." for x in (before, now))
    return f"{name}: {what} not what it has trained with (sha256 {a}, here {b})"


def _as_written_now(position: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored position as this version writes it.

    Older runs had no objective, took rows as they are drawn, wrote names of modules as one
    text, and had fewer settings of an adapter; what they lacked has its default. Settings that
    this version does not know stay as they are.
    """
    position = {"objective": "sft", "packing": "drawn", **position}
    try:
        lora = LoRAConfig.from_json(position["lora"])
    except (KeyError, TypeError, ConfigError):
        return position
    return position | {"lora": lora.as_json()}
