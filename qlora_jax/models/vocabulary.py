"""A decoder's vocabulary: rows added to its embedding and head, and the head untied."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.settings import MAX_ROWS
from qlora_jax.names import PER_LAYER, TABLES, dotted
from qlora_jax.nn.frozen import Adapted, Weighted, replaced

M = TypeVar("M", bound=nnx.Module)


def resize_tokens(
    model: Decoder, rows: int, pieces: Mapping[int, Sequence[int]] | None = None
) -> Decoder:
    """Grows embedding, untied head and per-layer table to a number of rows; never shrinks them.

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
    tables = {"embedding": model.embed_tokens, "head": model.lm_head}
    if model.per_layer is not None and rows > model.config.per_layer_vocab:
        tables["per-layer embedding"] = model.per_layer.embed_tokens_per_layer
    for name, table in tables.items():
        if isinstance(table, Adapted):
            raise ShapeError(f"the {name} is adapted already; resize before attach")
        flag = name.removeprefix("per-layer ")
        if table is not None and table.packed:
            raise ShapeError(
                f"the {name} is quantized and cannot take new rows; load it dense "
                f"(without {flag}=, --quant.{flag})"
            )

    def larger(path: tuple, node: Weighted) -> nnx.Module:
        name, table = dotted(path), node.stored
        if name not in TABLES or (name == PER_LAYER and table.shape[0] >= rows):
            return node
        # No adapter holds rows of the per-layer table, so they are what any base has there.
        made = node.holding(grown(table, rows) if name == PER_LAYER else grow(table))
        # How many rows are the base's own, for its fingerprint.
        own = node.variable.get_metadata().get("own_rows", table.shape[0])
        getattr(made, node.WEIGHT).set_metadata(own_rows=own)
        return made

    made = replaced(model, Weighted, larger)
    own = made.config.per_layer_vocab
    made.config = dataclasses.replace(
        made.config, vocab_size=rows, per_layer_vocab=own and max(rows, own)
    )
    return made


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


def is_tied(model: nnx.Module) -> bool:
    """Whether a model's head is its embedding."""
    return isinstance(model, Decoder) and model.lm_head is None


def was_tied(model: nnx.Module) -> bool:
    """Whether a model's head is its embedding, or was before it got a copy."""
    return isinstance(model, Decoder) and model.config.tie_word_embeddings


def vocab_size(model: nnx.Module) -> int:
    """Returns how many tokens a model knows; 0 for one that is no Decoder."""
    return model.config.vocab_size if isinstance(model, Decoder) else 0


def tied_again(model: M) -> M:
    """Lets the embedding be the head of a model again, where its folder has it so."""
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        model.lm_head = nnx.data(None)
    return model


def own_head(model: M) -> M:
    """Says in a model's config that its head is its own, where it has one."""
    if isinstance(model, Decoder) and model.lm_head is not None:
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return model


def untied(model: M) -> M:
    """Returns a model whose head is its own: a copy of the embedding, where it was tied."""
    if not is_tied(model):
        return model

    def copied(path: tuple, node: Decoder) -> Decoder:
        node.lm_head = nnx.data(node.embed_tokens.head())
        return node

    return replaced(model, Decoder, copied)
