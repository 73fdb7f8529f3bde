"""generate: prefill once, then one compiled loop over new tokens."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.generate.decoded import decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    """Most tokens to add."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution."""

    top_k: int | None = None
    """Sample among the k likeliest tokens."""

    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to p."""

    seed: int = 0
    """Of the sampling."""

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
) -> list[list[int]]:
    """Continues prompts, all of them at once.

    Rows are padded on the left to a common length, which attention does not see; a row
    ends at its first EOS, the batch when all have. On a CPU a 4-bit base is decoded first
    (`decoded`).

    Args:
      model: A Decoder, with or without an adapter.
      prompts: Token ids of each prompt, at least one token.
      config: How to choose tokens.
      eos_ids: Ids that end a row.

    Returns:
      The new tokens of each row, EOS left out.

    Raises:
      ShapeError: a prompt is empty, or has an id outside the vocabulary.
    """
    config = config or SampleConfig()
    if not prompts:
        return []
    if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ShapeError(f"prompts {empty} have no tokens; give at least a BOS")
    size = model.config.vocab_size
    if wrong := sorted({t for prompt in prompts for t in prompt if not 0 <= t < size}):
        raise ShapeError(f"prompts have ids {wrong}; the vocabulary has {size}")
    longest = max(len(prompt) for prompt in prompts)
    longest = -(-longest // 32) * 32  # few lengths, since each compiles anew
    tokens = np.zeros((len(prompts), longest), np.int32)
    positions = np.full((len(prompts), longest), -1, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = prompt
        positions[i, longest - len(prompt) :] = np.arange(len(prompt))
    graphdef, state = nnx.split(decoded(model))
    new = _generate(
        graphdef,
        dataclasses.replace(config, seed=0),
        tuple(eos_ids),
        state,
        tokens,
        positions,
        jax.random.key(config.seed),
    )
    rows = []
    for row in np.asarray(new).tolist():
        end = next((i for i, token in enumerate(row) if token in eos_ids), len(row))
        rows.append(row[:end])
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graphdef: nnx.GraphDef,
    config: SampleConfig,
    eos_ids: tuple[int, ...],
    state: nnx.State,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    key: Array,
) -> Int[Array, "batch new"]:
    model = nnx.merge(graphdef, state)
    batch, seq = tokens.shape
    ends = jnp.array(eos_ids or (-1,), jnp.int32)
    pad = ends[0]
    cache = model.empty_cache(batch, seq + config.max_new_tokens)
    logits, cache = model.decode(tokens, positions, cache)

    def unfinished(carry):
        i, done, *_ = carry
        return (i < config.max_new_tokens) & ~done.all()

    def step(carry):
        i, done, logits, cache, position, new = carry
        token = _choose(logits, config, jax.random.fold_in(key, i))
        token = jnp.where(done, pad, token)
        new = new.at[:, i].set(token)
        done = done | (token[:, None] == ends).any(axis=1)
        position = position + 1
        logits, cache = model.decode(token[:, None], position[:, None], cache)
        return i + 1, done, logits, cache, position, new

    # Without any EOS the padding is -1, which no tokenizer decodes: it is never kept,
    # because then all rows run to the end.
    start = (
        jnp.int32(0),
        jnp.zeros(batch, bool),
        logits,
        cache,
        positions[:, -1],
        jnp.full((batch, config.max_new_tokens), pad, jnp.int32),
    )
    return jax.lax.while_loop(unfinished, step, start)[-1]


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
