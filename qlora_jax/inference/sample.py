"""generate: prefill once, then one compiled loop over new tokens.

Where texts end an answer the loop is left every STRIDE tokens, so that the host can look for
them; it goes on with the same program.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.inference.context import say_beyond_context
from qlora_jax.inference.decoded import decoded
from qlora_jax.inference.stop import Stop

STRIDE = 16
"""Tokens between two looks for the texts that end an answer. A row decodes up to so many in
vain; each look waits for the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """These settings say how each next token is chosen."""

    max_new_tokens: int = 128
    """Most tokens to add."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution."""

    top_k: int | None = None
    """Sample among the k likeliest tokens."""

    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to p."""

    seed: int = 0
    """Tokens are drawn from this number; the same one gives the same tokens."""

    def __post_init__(self):
        problems = []
        if self.max_new_tokens < 1:
            problems.append(
                f"--max-new-tokens is {self.max_new_tokens}, expected 1 or more"
            )
        if not 0 <= self.temperature < math.inf:
            problems.append(f"--temperature is {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top-k is {self.top_k}, expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}, expected 0 < p <= 1")
        if problems:
            raise ConfigError("; ".join(problems))


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig | None = None,
    *,
    eos_ids: Sequence[int] = (),
    stop: Stop | None = None,
) -> list[list[int]]:
    """Continues prompts, all of them at once.

    Rows are padded on the left to a common length, which attention does not see; a row
    ends at its first EOS or text to stop at, the batch when all have. On a CPU a 4-bit base is
    decoded first (`decoded`).

    Args:
      model: A Decoder, with or without an adapter.
      prompts: Token ids of each prompt, at least one token.
      config: The settings that tokens are chosen by; None takes the likeliest each time.
      eos_ids: Ids that end a row.
      stop: Instead of eos_ids: ids and texts that end a row (`Stop.of`).

    Returns:
      The new tokens of each row, EOS left out. A row that a text ended holds the fewest
      tokens that have it; `Stop.cut` leaves it out of their text.

    Raises:
      ShapeError: a prompt is empty, or has an id outside the vocabulary.
    """
    config = config or SampleConfig()
    stop = stop or Stop(tuple(eos_ids))
    if not prompts:
        return []
    tokens, positions = _padded(prompts, model.config.vocab_size)
    longest = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    say_beyond_context(model.config, longest, "prompts and new tokens")
    graphdef, state = nnx.split(decoded(model))
    static = (graphdef, dataclasses.replace(config, seed=0), stop.ids)
    carry = _prefill(*static, state, tokens, positions)
    key = jax.random.key(config.seed)
    most = config.max_new_tokens
    stride = STRIDE if stop.texts else most
    counts: dict[int, int] = {}  # tokens of the rows that a text ended
    ended = np.zeros(len(prompts), bool)
    for seen in range(0, most, stride):
        until = min(seen + stride, most)
        carry = _continue(*static, state, carry, key, until, ended)
        for i, row in enumerate(_rows(carry, stop.ids)):
            if not ended[i] and (count := stop.first(row, seen)) is not None:
                counts[i], ended[i] = count, True
        if (ended | np.asarray(carry[1])).all():
            break
    return [row[: counts.get(i)] for i, row in enumerate(_rows(carry, stop.ids))]


def _padded(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and positions, int32 (batch, seq), padded on the left."""
    if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ShapeError(f"prompts {empty} have no tokens; give at least a BOS")
    every = {token for prompt in prompts for token in prompt}
    if wrong := sorted(token for token in every if not 0 <= token < vocab_size):
        raise ShapeError(f"prompts have ids {wrong}; the vocabulary has {vocab_size}")
    longest = max(len(prompt) for prompt in prompts)
    longest = -(-longest // 32) * 32  # few lengths, since each compiles anew
    tokens = np.zeros((len(prompts), longest), np.int32)
    positions = np.full((len(prompts), longest), -1, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = prompt
        positions[i, longest - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def _rows(carry: tuple, eos_ids: tuple[int, ...]) -> list[list[int]]:
    """Returns each row's tokens so far, up to its EOS."""
    count, new = int(carry[0]), np.asarray(carry[-1])
    rows = []
    for row in new[:, :count].tolist():
        end = next((i for i, token in enumerate(row) if token in eos_ids), len(row))
        rows.append(row[:end])
    return rows


# Of functions that stay the same, so that models of one structure compile once.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graphdef: nnx.GraphDef,
    config: SampleConfig,
    eos_ids: tuple[int, ...],
    state: nnx.State,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
) -> tuple:
    """Returns what `_continue` carries: tokens made, rows that are done, logits, cache,
    positions, new tokens (batch, max_new_tokens)."""
    model = nnx.merge(graphdef, state)
    batch, seq = tokens.shape
    cache = model.empty_cache(batch, seq + config.max_new_tokens)
    logits, cache = model.decode(tokens, positions, cache)
    # Without any EOS the padding is -1, which no tokenizer decodes: it is never kept,
    # because then a row ends where its text does, or at the end.
    pad = (eos_ids or (-1,))[0]
    new = jnp.full((batch, config.max_new_tokens), pad, jnp.int32)
    done = jnp.zeros(batch, bool)
    return jnp.int32(0), done, logits, cache, positions[:, -1], new


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _continue(
    graphdef: nnx.GraphDef,
    config: SampleConfig,
    eos_ids: tuple[int, ...],
    state: nnx.State,
    carry: tuple,
    key: Array,
    until: Int[Array, ""] | int,
    ended: Bool[Array, " batch"],
) -> tuple:
    """Makes tokens until there are `until`, or all rows are done; some have ended already."""
    model = nnx.merge(graphdef, state)
    ends = jnp.array(eos_ids or (-1,), jnp.int32)

    def unfinished(carry):
        i, done, *_ = carry
        return (i < until) & ~done.all()

    def step(carry):
        i, done, logits, cache, position, new = carry
        token = _choose(logits, config, jax.random.fold_in(key, i))
        token = jnp.where(done, ends[0], token)
        new = new.at[:, i].set(token)
        done = done | (token[:, None] == ends).any(axis=1)
        position = position + 1
        logits, cache = model.decode(token[:, None], position[:, None], cache)
        return i + 1, done, logits, cache, position, new

    carry = (carry[0], carry[1] | ended, *carry[2:])
    return jax.lax.while_loop(unfinished, step, carry)


def _choose(
    logits: Float[Array, "batch vocab"], config: SampleConfig, key: Array
) -> Int[Array, " batch"]:
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p is not None and config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # mass ahead of each token; the first stays
        least = jnp.where(before < config.top_p, ordered, jnp.inf).min(
            -1, keepdims=True
        )
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
