"""One decoder-only transformer, configured for each family.

The layers are one `DecoderLayer` whose arrays have a leading axis of layers, applied by
a scan: compile time does not grow with depth, and one layer's decoded weights are alive
at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.nn.attention import attention, causal_attention
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import LoRA
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.rope import RopeScaling, inverse_frequencies, rotate, rotation
from qlora_jax.nn.variables import FrozenParam

Checkpoint = Literal["none", "layer"]
"""What backward recomputes: 'none' elementwise work only, 'layer' each whole layer."""

SAVED = ("q", "k", "v", "mixed", "middle", "gate", "up", "lora_hidden")
"""Activations kept for backward without checkpointing: each matmul's output and the
residual stream. Norms, rotations and the gated product are made again from them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; names as in design.md, sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2; Llama's optional attention_bias)."""
    output_bias: bool = False
    """Bias on the attention's output projection (Llama's attention_bias alone)."""
    sliding_window: int | None = None
    """Positions that a token sees, itself included; None for all before it."""
    max_position_embeddings: int = 2048


class KVCache(nnx.Pytree):
    """Keys and values of the tokens seen so far.

    Attributes:
      k: (layers, batch, capacity, kv_heads, head_dim), rotated.
      v: The same shape.
      positions: int32 (batch, capacity); -1 where nothing is stored or the token was
        padding.
      length: int32 (), slots filled.
    """

    def __init__(self, k: Array, v: Array, positions: Array, length: Array):
        self.k, self.v = nnx.data(k), nnx.data(v)
        self.positions, self.length = nnx.data(positions), nnx.data(length)


def apply(linear: Any, x: Array, key: Array | None, index: int) -> Array:
    """Applies a linear, with its own dropout key where it is a LoRA."""
    if isinstance(linear, LoRA):
        return linear(x, key=None if key is None else jax.random.fold_in(key, index))
    return linear(x)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, linear: Callable[..., Linear]):
        self.config = config
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = linear("q_proj", q_size, hidden, bias)
        self.k_proj = linear("k_proj", kv_size, hidden, bias)
        self.v_proj = linear("v_proj", kv_size, hidden, bias)
        self.o_proj = linear("o_proj", hidden, q_size, config.output_bias)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        positions: Int[Array, "batch seq"],
        cos_sin: tuple[Array, Array],
        cache: tuple[Array, Array, Array, Array] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], tuple[Array, Array] | None]:
        """Attends; with a cache, over its keys and the new ones, which are returned."""
        c = self.config
        heads = lambda y, n: y.reshape(*x.shape[:2], n, c.head_dim)  # noqa: E731
        q = heads(apply(self.q_proj, x, key, 0), c.num_heads)
        k = heads(apply(self.k_proj, x, key, 1), c.num_kv_heads)
        v = heads(apply(self.v_proj, x, key, 2), c.num_kv_heads)
        q = checkpoint_name(rotate(q, cos_sin), "q")
        k = checkpoint_name(rotate(k, cos_sin), "k")
        v = checkpoint_name(v, "v")
        if cache is None:
            mixed, new = causal_attention(q, k, v, window=c.sliding_window), None
        else:
            cache_k, cache_v, k_positions, length = cache
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=1
            )
            k = put(cache_k, k.astype(cache_k.dtype))
            v = put(cache_v, v.astype(cache_v.dtype))
            new = (k, v)
            mixed = attention(q, k, v, positions, k_positions, window=c.sliding_window)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), "mixed")
        return apply(self.o_proj, mixed, key, 3), new


class MLP(nnx.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, linear: Callable[..., Linear]):
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = linear("gate_proj", wide, hidden, False)
        self.up_proj = linear("up_proj", wide, hidden, False)
        self.down_proj = linear("down_proj", hidden, wide, False)

    def __call__(
        self, x: Float[Array, "batch seq hidden"], key: Array | None = None
    ) -> Float[Array, "batch seq hidden"]:
        """Applies the three projections."""
        gate = checkpoint_name(apply(self.gate_proj, x, key, 4), "gate")
        up = checkpoint_name(apply(self.up_proj, x, key, 5), "up")
        return apply(self.down_proj, jax.nn.silu(gate) * up, key, 6)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm_weight: Callable,
    ):
        eps = config.rms_norm_eps
        self.attn_norm = RMSNorm(norm_weight(), eps)
        self.attn = Attention(config, linear)
        self.mlp_norm = RMSNorm(norm_weight(), eps)
        self.mlp = MLP(config, linear)

    def __call__(self, x, positions, cos_sin, cache=None, key=None):
        """Returns (the stream after the layer, the cache's new keys and values)."""
        mixed, new = self.attn(self.attn_norm(x), positions, cos_sin, cache, key)
        x = checkpoint_name(x + mixed, "middle")
        return x + self.mlp(self.mlp_norm(x), key), new


class Decoder(nnx.Module):
    """Tokens to logits.

    Attributes:
      config: Its shape.
      embed_tokens: FrozenParam (vocab, hidden); its dtype is the compute dtype.
      layers: One DecoderLayer, every array with a leading axis of layers.
      norm: The final RMSNorm.
      lm_head: Linear, or None when the embedding is tied.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        key: Array,
        dtype: jnp.dtype | str = "bfloat16",
    ):
        """Makes a decoder with random weights, N(0, 0.02)."""
        self.config = config
        stack = (config.num_layers,)
        keys = iter(jax.random.split(key, 16))

        def normal(*shape: int) -> Array:
            return (0.02 * jax.random.normal(next(keys), shape)).astype(dtype)

        def linear(name: str, out: int, features: int, bias: bool) -> Linear:
            kernel = normal(*stack, out, features)
            return Linear(kernel, jnp.zeros((*stack, out), dtype) if bias else None)

        def norm_weight() -> Array:
            return jnp.ones((*stack, config.hidden_size), dtype)

        self.embed_tokens = FrozenParam(normal(config.vocab_size, config.hidden_size))
        self.layers = DecoderLayer(config, linear, norm_weight)
        self.norm = RMSNorm(jnp.ones(config.hidden_size, dtype), config.rms_norm_eps)
        head = None
        if not config.tie_word_embeddings:
            head = Linear(normal(config.vocab_size, config.hidden_size))
        self.lm_head = nnx.data(head)

    @property
    def head(self) -> Any:
        """The linear from hidden states to logits: lm_head, or the tied embedding."""
        return Linear(self.embed_tokens[...]) if self.lm_head is None else self.lm_head

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations and matmuls."""
        return self.embed_tokens[...].dtype

    def __call__(
        self, tokens: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq vocab"]:
        """Returns float32 logits of every position."""
        return self.logits(self.hidden_states(tokens))

    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Applies the head to normed hidden states; float32."""
        return self.head(hidden).astype(jnp.float32)

    def hidden_states(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        key: Array | None = None,
        checkpoint: Checkpoint = "none",
    ) -> Float[Array, "batch seq hidden"]:
        """Returns the final normed hidden states, what the head takes.

        Args:
          tokens: Token ids. Padding belongs to the right, where causality hides it.
          key: For LoRA dropout; None switches it off.
          checkpoint: What backward recomputes.
        """
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
        )
        graphdef, state = nnx.split(self.layers)
        cos_sin = self._rotation(positions)
        keys = None
        if key is not None:
            keys = jax.random.split(key, self.config.num_layers)

        def body(x, slices):
            layer_state, layer_key = slices
            layer = nnx.merge(graphdef, layer_state)
            return layer(x, positions, cos_sin, None, layer_key)[0], None

        policy = None
        if checkpoint == "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
        # Inside a scan there is nothing to deduplicate against, so CSE stays allowed.
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x = self.embed_tokens[...][tokens]
        x, _ = jax.lax.scan(body, x, (state, keys))
        return self.norm(x)

    def decode(
        self, tokens: Int[Array, "batch seq"], positions: Array, cache: KVCache
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Continues from a cache: prefill (seq > 1) or one step (seq 1).

        Args:
          tokens: The next tokens; padding belongs to the left.
          positions: int32 (batch, seq); -1 for padding.
          cache: From `empty_cache`, or from the last call.

        Returns:
          Float32 logits after the last token, and the cache with the tokens added.
        """
        graphdef, state = nnx.split(self.layers)
        cos_sin = self._rotation(positions)
        k_positions = jax.lax.dynamic_update_slice_in_dim(
            cache.positions, positions, cache.length, axis=1
        )

        def body(x, slices):
            layer_state, k, v = slices
            layer = nnx.merge(graphdef, layer_state)
            layer_cache = (k, v, k_positions, cache.length)
            return layer(x, positions, cos_sin, layer_cache)

        x = self.embed_tokens[...][tokens]
        x, new = jax.lax.scan(body, x, (state, cache.k, cache.v))
        k, v = cast(tuple[Array, Array], new)
        logits = self.logits(self.norm(x[:, -1]))
        return logits, KVCache(k, v, k_positions, cache.length + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Returns a cache for `capacity` tokens a row, in the compute dtype."""
        c = self.config
        shape = (c.num_layers, batch, capacity, c.num_kv_heads, c.head_dim)
        # Two buffers, not one twice: a caller may donate the cache.
        k, v = (jnp.zeros(shape, self.compute_dtype) for _ in range(2))
        nothing = jnp.full((batch, capacity), -1, jnp.int32)
        return KVCache(k, v, nothing, jnp.int32(0))

    def _rotation(self, positions: Array) -> tuple[Array, Array]:
        c = self.config
        frequencies = inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return rotation(positions, frequencies)
