"""The reference is asked once about rows, which keep what it says.

The reference is the base without its adapter, which training does not change, so that a step
need not run it again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.attach import detach
from qlora_jax.data import Dataset, cache
from qlora_jax.data.fields import REFERENCE
from qlora_jax.data.layout import padded_length
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.objectives.answers import answers_of


def with_reference(
    data: Dataset,
    model: nnx.Module,
    micro_batch: int,
    *,
    keep: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Returns a dataset whose rows have the reference's log-probabilities of their answers.

    Args:
      data: Pairs, or judged rows.
      model: The model with an adapter that has not been trained yet.
      micro_batch: Rows of a micro-batch, as training has them; the reference takes twice as
        many rows at a time, since rows go in pairs there.
      keep: A folder for what the reference said, which is read there the next time.
      identity: What tells this base from others, JSON values; nothing is kept without.
      progress: Called with the number of rows that are done.

    Raises:
      AdapterMismatchError: something of the base trains in place, and does not begin as the
        base has it.
    """
    rows = [one for row in data.rows for one in (row, row.other) if one is not None]
    name = None if identity is None or keep is None else _name(identity, rows)
    values = None if keep is None or name is None else cache.read_values(keep, name)
    if values is None or len(values) != len(rows):
        values = reference_values(_reference(model), rows, 2 * micro_batch, progress)
        if keep is not None and name is not None:
            cache.write_values(keep, name, values)
    each = iter(values)
    made = []
    for row in data.rows:
        row = _with(row, next(each))
        if row.other is not None:
            row = row._replace(other=_with(row.other, next(each)))
        made.append(row)
    return Dataset(made, data.max_tokens, data.dropped, data.shares)


def reference_values(
    model: Any,
    rows: Sequence[Row],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Returns the log-probability of each row's answer by a model, float32 (rows,)."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def said(state: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        model: Any = nnx.merge(graphdef, state)
        hidden = model.hidden_states(batch["tokens"])
        return answers_of(model.head, hidden, batch).logps

    found = np.zeros(len(rows), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(rows), batch_size):
        some = order[start : start + batch_size]
        longest = len(rows[some[-1]].tokens)
        shape = (batch_size, padded_length(longest, 2 * longest))
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for i, number in enumerate(some):
            row = rows[number]
            tokens[i, : len(row.tokens)] = row.tokens
            weights[i, : len(row.tokens)] = row.weights
        values = said(state, {"tokens": tokens, "weights": weights})
        found[some] = np.asarray(values)[: len(some)]
        if progress is not None:
            progress(start + len(some))
    return found


def _reference(model: nnx.Module) -> Any:
    try:
        return detach(model)
    except AdapterMismatchError:
        # What trains in place is the base's own until training begins, if the adapter
        # changes nothing at first.
        lora = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        factors = [v.get_value() for path, v in lora if path[-1] == "lora_b"]
        if any(np.asarray(x).any() for x in factors):
            raise
        return model


def _with(row: Row, value: np.float32) -> Row:
    return row._replace(extras={**row.extras, REFERENCE: value})


def _name(identity: Mapping[str, Any], rows: Sequence[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dict(identity), sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(len(row.tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(row.tokens, np.int32))
        digest.update(np.ascontiguousarray(row.weights, np.float32))
    return digest.hexdigest()
