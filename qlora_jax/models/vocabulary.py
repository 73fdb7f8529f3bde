"""A decoder's vocabulary: rows added to its embedding and head, and the head untied."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.settings import MAX_ROWS
from qlora_jax.nn import Embedding, Linear, QuantizedEmbedding, QuantizedLinear


def resize_tokens(
    model: Decoder, rows: int, pieces: Mapping[int, Sequence[int]] | None = None
) -> Decoder:
    """Grows embedding and untied head to a number of rows; never shrinks them.

    Args:
      model: A model without adapter. It is left as it was.
      rows: The number of rows wanted; fewer than there are change nothing.
      pieces: Row -> tokens whose mean it begins as, among old rows too; other new rows
        are the mean of all.

    Raises:
      ShapeError: the embedding or head is adapted, or quantized.
    """
    pieces = {row: list(ids) for row, ids in (pieces or {}).items() if ids}
    rows = max(rows, model.config.vocab_size)
    grow = lambda table: grown(table, rows, pieces)  # noqa: E731
    if rows == model.config.vocab_size and not pieces:
        return model
    for name, table in (("embedding", model.embed_tokens), ("head", model.lm_head)):
        if isinstance(table, (QuantizedEmbedding, QuantizedLinear)):
            raise ShapeError(
                f"the {name} is quantized and cannot take new rows; load it dense "
                f"(without {name}=, --quant.{name})"
            )
        if not isinstance(table, (Embedding, Linear, type(None))):
            raise ShapeError(f"the {name} is adapted already; resize before attach")

    def replace(path: tuple, node: Any) -> Any:
        if isinstance(node, Embedding):
            return _marked(Embedding(grow(node.weight[...])), "weight", node.weight)
        if path == ("lm_head",) and isinstance(node, Linear):
            return _marked(Linear(grow(node.kernel[...])), "kernel", node.kernel)
        if isinstance(node, Decoder):
            node.config = dataclasses.replace(node.config, vocab_size=rows)
        return node

    return nnx.recursive_map(replace, model)


def check_rows(model: Decoder, rows: Sequence[int], ids: Sequence[int]) -> None:
    """Refuses ids of tokens that a vocabulary cannot have, before it grows to have them.

    Args:
      model: The model that the tokens are added to.
      rows: Rows of the tables that replace its own.
      ids: Ids of tokens whose rows train.

    Raises:
      ConfigError: an id is beyond the rows, also if each of these tokens has added one; or
        there are more rows than MAX_ROWS.
    """
    most = max(model.config.vocab_size, *rows, 0) + len(ids)
    if beyond := [i for i in ids if i >= most]:
        raise ConfigError(
            f"the adapter trains the row of token {beyond[0]}, and the model has "
            f"{model.config.vocab_size} rows, {most} with those that were added"
        )
    if most > MAX_ROWS:
        raise ConfigError(f"the adapter has {most} rows, expected at most {MAX_ROWS}")


def _marked(module: Any, name: str, before: nnx.Variable) -> Any:
    """Remembers how many rows are the base's own, for its fingerprint."""
    own = before.get_metadata().get("own_rows", before.get_value().shape[0])
    getattr(module, name).set_metadata(own_rows=own)
    return module


def grown(
    table: Array, rows: int, pieces: Mapping[int, Sequence[int]] | None = None
) -> Array:
    """Returns a table with more rows, as `resize_tokens` makes them."""
    wide = table.astype(jnp.float32)
    mean = jnp.broadcast_to(wide.mean(0), (rows - table.shape[0], table.shape[1]))
    larger = jnp.concatenate([wide, mean])
    for row, ids in (pieces or {}).items():
        larger = larger.at[row].set(wide[jnp.asarray(ids)].mean(0))
    return larger.astype(table.dtype)


def untied(model: Decoder) -> Decoder:
    """Returns a model whose head is its own: a copy of the embedding, where it was tied."""
    if model.lm_head is not None:
        return model

    def replace(path: tuple, node: Any) -> Any:
        if isinstance(node, Decoder):
            node.lm_head = nnx.data(node.embed_tokens.head())
        return node

    return nnx.recursive_map(replace, model)
