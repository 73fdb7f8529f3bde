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

from qlora_jax.config.train import Checkpoint
from qlora_jax.models.streaming import copies_ahead, scan_ahead
from qlora_jax.nn.attention import attention, causal_attention
from qlora_jax.nn.embedding import Embedding
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import LoRA
from qlora_jax.nn.moe import Experts, Router
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.rope import RopeScaling, rotate, rotation
from qlora_jax.nn.variables import arrive, rests_on_host

SAVED = (
    *("q", "k", "v", "mixed", "middle", "gate", "up", "gate_up"),
    *("unnormed", "lora_hidden", "lora_norms", "lora_unscaled"),
)
"""Activations kept for backward without checkpointing: each matmul's output and the
residual stream. Norms, rotations and the gated product are made again from them."""

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ between layers whose parameters are alike."""

    window: int | None = None
    """Positions that a token sees, itself included; None for all before it."""

    rope: Literal["global", "local", "none"] = "global"
    """Which rotary positions: those of rope_theta, of local_rope_theta, or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; names as in design.md, sizes in elements."""

    model_type: str = dataclasses.field(default="llama", compare=False)
    """The family, whose Hugging Face names its parameters have."""
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
    local_rope_theta: float = 10000.0
    rotary_dim: int | None = None
    """Features of a head that are rotated, the first ones; None for all."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2; Llama's optional attention_bias)."""
    output_bias: bool = False
    """Bias on the attention's output projection (Llama's attention_bias alone)."""
    sliding_window: int | None = None
    """Of every layer, where layer_kinds is empty."""
    layer_kinds: tuple[LayerKind, ...] = ()
    """One a layer; empty where all are alike. Layers are scanned by the shortest group
    that repeats."""
    max_position_embeddings: int = 2048
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norms: Literal["pre", "post", "both"] = "pre"
    """Whether attention and feed-forward have a norm before, after, or both (Gemma 2)."""
    norm_offset: float = 0.0
    """Added to norms' stored weights (1 for Gemma)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm on queries and keys: of each head (Qwen3), or over all heads (OLMo 2)."""
    fused: bool = False
    """One linear for q, k and v, and one for gate and up (Phi-3)."""
    attention_scale: float | None = None
    """Of scores; None for head_dim**-0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What attention and feed-forward are multiplied by before they are added."""
    logit_scale: float = 1.0
    num_experts: int = 0
    """Feed-forwards to choose from; 0 for one that all tokens take."""
    experts_per_token: int = 2
    normalize_experts: bool = True
    """Whether the chosen experts' weights are scaled to sum to 1."""

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (LayerKind(window=self.sliding_window),) * (
            self.num_layers
        )

    @property
    def period(self) -> int:
        """Layers of the shortest group that repeats (the last one may be cut)."""
        kinds = self.kinds
        return next(
            p
            for p in range(1, len(kinds) + 1)
            if all(kind == kinds[i % p] for i, kind in enumerate(kinds))
        )


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

    def __init__(
        self,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[[int], RMSNorm],
    ):
        c = self.config = config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        hidden, bias = c.hidden_size, c.attention_bias
        if c.fused:
            self.qkv_proj = linear(q_size + 2 * kv_size, hidden, bias)
        else:
            self.q_proj = linear(q_size, hidden, bias)
            self.k_proj = linear(kv_size, hidden, bias)
            self.v_proj = linear(kv_size, hidden, bias)
        self.o_proj = linear(hidden, q_size, c.output_bias)
        if c.qk_norm != "none":
            per_head = c.qk_norm == "head"
            self.q_norm = norm(c.head_dim if per_head else q_size)
            self.k_norm = norm(c.head_dim if per_head else kv_size)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        kind: LayerKind,
        positions: Int[Array, "batch seq"],
        rotations: dict[str, tuple[Array, Array]],
        cache: tuple[Array, Array, Array, Array] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], tuple[Array, Array] | None]:
        """Attends; with a cache, over its keys and the new ones, which are returned."""
        c = self.config
        q, k, v = self._projected(x, key)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, c.head_dim)  # noqa: E731
        if c.qk_norm != "none":
            q, k = checkpoint_name(q, "unnormed"), checkpoint_name(k, "unnormed")
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = heads(q, c.num_heads), heads(k, c.num_kv_heads)
        v = heads(v, c.num_kv_heads)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if kind.rope != "none":
            cos_sin = rotations[kind.rope]
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        q, k, v = (checkpoint_name(*y) for y in ((q, "q"), (k, "k"), (v, "v")))
        options = {
            "window": kind.window,
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
        }
        if cache is None:
            mixed, new = causal_attention(q, k, v, **options), None
        else:
            cache_k, cache_v, k_positions, length = cache
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=1
            )
            k = put(cache_k, k.astype(cache_k.dtype))
            v = put(cache_v, v.astype(cache_v.dtype))
            new = (k, v)
            mixed = attention(q, k, v, positions, k_positions, **options)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), "mixed")
        return apply(self.o_proj, mixed, key, 3), new

    def _projected(self, x: Array, key: Array | None) -> list[Array]:
        c = self.config
        if not c.fused:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [apply(one, x, key, i) for i, one in enumerate(projections)]
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = apply(self.qkv_proj, x, key, 0)
        return jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)


class MLP(nnx.Module):
    """The gated feed-forward: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, linear: Callable[..., Linear]):
        hidden, wide = config.hidden_size, config.intermediate_size
        self.config = config
        if config.fused:
            self.gate_up_proj = linear(2 * wide, hidden, False)
        else:
            self.gate_proj = linear(wide, hidden, False)
            self.up_proj = linear(wide, hidden, False)
        self.down_proj = linear(hidden, wide, False)

    def __call__(
        self, x: Float[Array, "*batch hidden"], key: Array | None = None
    ) -> Float[Array, "*batch hidden"]:
        """Applies the projections."""
        if self.config.fused:
            both = checkpoint_name(apply(self.gate_up_proj, x, key, 4), "gate_up")
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = checkpoint_name(apply(self.gate_proj, x, key, 4), "gate")
            up = checkpoint_name(apply(self.up_proj, x, key, 5), "up")
        act = ACTIVATIONS[self.config.activation]
        return apply(self.down_proj, act(gate) * up, key, 6)


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each with its norms added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[[int], RMSNorm],
        mlp: Callable[[], Any],
    ):
        hidden = config.hidden_size
        self.config = config
        if config.norms != "post":
            self.attn_norm = norm(hidden)
            self.mlp_norm = norm(hidden)
        if config.norms != "pre":
            self.attn_post_norm = norm(hidden)
            self.mlp_post_norm = norm(hidden)
        self.attn = Attention(config, linear, norm)
        self.mlp = mlp()

    def __call__(self, x, kind, positions, rotations, cache=None, key=None):
        """Returns (the stream after the layer, the cache's new keys and values)."""
        before, after = self.config.norms != "post", self.config.norms != "pre"
        scale = self.config.residual_scale
        y = self.attn_norm(x) if before else x
        y, new = self.attn(y, kind, positions, rotations, cache, key)
        y = self.attn_post_norm(checkpoint_name(y, "unnormed")) if after else y
        x = checkpoint_name(x + _scaled(y, scale), "middle")
        y = self.mlp(self.mlp_norm(x) if before else x, key)
        y = self.mlp_post_norm(checkpoint_name(y, "unnormed")) if after else y
        return x + _scaled(y, scale), new


class Head(nnx.Module):
    """A linear whose logits are scaled (Granite) or capped (Gemma 2)."""

    def __init__(self, linear: Any, scale: float, softcap: float | None):
        self.linear = linear
        self.scale = scale
        self.softcap = softcap

    @property
    def out_features(self) -> int:
        """Size of the vocabulary."""
        return self.linear.out_features

    def __call__(
        self, x: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Returns logits in x's dtype."""
        logits = _scaled(self.linear(x), self.scale)
        if self.softcap is not None:
            logits = jnp.tanh(logits / self.softcap) * self.softcap
        return logits


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def _policy(checkpoint: Checkpoint) -> Any:
    """Returns jax.checkpoint's policy."""
    policies = jax.checkpoint_policies
    if checkpoint == "none":
        return policies.save_only_these_names(*SAVED)
    if checkpoint == "attention":
        return policies.save_only_these_names("mixed")
    if checkpoint == "host":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


class Decoder(nnx.Module):
    """Tokens to logits.

    Attributes:
      config: Its shape.
      dtype: Name of the compute dtype, that of activations and matmuls.
      embed_tokens: The Embedding.
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
        layers = (config.num_layers,)
        keys = iter(jax.random.split(key, 24))

        def normal(*shape: int) -> Array:
            return (0.02 * jax.random.normal(next(keys), shape)).astype(dtype)

        def linears(stack: tuple[int, ...]) -> Callable[..., Linear]:
            def linear(out: int, features: int, bias: bool) -> Linear:
                kernel = normal(*stack, out, features)
                return Linear(kernel, jnp.zeros((*stack, out), dtype) if bias else None)

            return linear

        def norm(features: int, stack: tuple[int, ...] = layers) -> RMSNorm:
            weight = jnp.full((*stack, features), 1 - config.norm_offset, dtype)
            return RMSNorm(weight, config.rms_norm_eps, config.norm_offset)

        def mlp() -> Any:
            experts = config.num_experts
            if not experts:
                return MLP(config, linears(layers))
            router = Router(
                normal(*layers, experts, config.hidden_size),
                config.experts_per_token,
                config.normalize_experts,
            )
            return Experts(router, MLP(config, linears((*layers, experts))), experts)

        self.dtype = jnp.dtype(dtype).name
        self.embed_tokens: Any = Embedding(
            normal(config.vocab_size, config.hidden_size)
        )
        self.layers = DecoderLayer(config, linears(layers), norm, mlp)
        self.norm = norm(config.hidden_size, ())
        head = None
        if not config.tie_word_embeddings:
            head = Linear(normal(config.vocab_size, config.hidden_size))
        self.lm_head = nnx.data(head)

    @property
    def head(self) -> Any:
        """What makes logits of hidden states: lm_head, or the tied embedding."""
        c = self.config
        head = self.embed_tokens.head() if self.lm_head is None else self.lm_head
        if c.logit_scale == 1 and c.logit_softcap is None:
            return head
        return Head(head, c.logit_scale, c.logit_softcap)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations and matmuls."""
        return jnp.dtype(self.dtype)

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
        tokens: Int[Array, "*micro batch seq"],
        *,
        key: Array | None = None,
        checkpoint: Checkpoint = "none",
    ) -> Float[Array, "*micro batch seq hidden"]:
        """Returns the final normed hidden states, what the head takes.

        Args:
          tokens: Token ids. Padding belongs to the right, where causality hides it. With
            a third axis in front, each layer goes over all micro-batches before the next:
            a layer that comes from host memory comes once for all of them.
          key: For LoRA dropout; None switches it off.
          checkpoint: What backward recomputes.
        """
        *micro, batch, seq = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
        rotations = self._rotations(positions)
        keys = None if key is None else self._layer_keys(key, micro)

        def apply_layer(layer, kind, x, layer_key):
            x = checkpoint_name(x, "layer_input")
            if not micro:
                return layer(x, kind, positions, rotations, None, layer_key)

            def one(_, xs):
                x, key = xs
                return None, layer(x, kind, positions, rotations, None, key)[0]

            if checkpoint != "none":
                # Else backward would make again what all micro-batches keep, at once.
                one = jax.checkpoint(one, policy=_policy(checkpoint), prevent_cse=False)
            # From the last on, so that backward adds up gradients from the first.
            return jax.lax.scan(one, None, (x, layer_key), reverse=True)[1], None

        x = self._embed(tokens.reshape(-1, seq))
        x = x.reshape(*tokens.shape, -1)
        x, _ = self._scan(apply_layer, x, keys, checkpoint)
        return self.norm(x)

    def _layer_keys(self, key: Array, micro: list[int]) -> Array:
        """Returns a key a layer, or a layer and micro-batch."""
        split = functools.partial(jax.random.split, num=self.config.num_layers)
        if not micro:
            return split(key)
        each = jax.vmap(functools.partial(jax.random.fold_in, key))(
            jnp.arange(micro[0])
        )
        return jax.vmap(split, out_axes=1)(each)

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
        rotations = self._rotations(positions)
        k_positions = jax.lax.dynamic_update_slice_in_dim(
            cache.positions, positions, cache.length, axis=1
        )

        def apply_layer(layer, kind, x, kv):
            layer_cache = (*kv, k_positions, cache.length)
            return layer(x, kind, positions, rotations, layer_cache)

        x, new = self._scan(apply_layer, self._embed(tokens), (cache.k, cache.v))
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

    def _embed(self, tokens: Array) -> Array:
        x = self.embed_tokens(tokens).astype(self.compute_dtype)
        return _scaled(x, self.config.embedding_scale)

    def _rotations(self, positions: Array) -> dict[str, tuple[Array, Array]]:
        c = self.config
        dim = c.rotary_dim or c.head_dim
        made = {"global": rotation(positions, dim, c.rope_theta, c.rope_scaling)}
        if any(kind.rope == "local" for kind in c.kinds):
            made["local"] = rotation(positions, dim, c.local_rope_theta, None)
        return made

    def _scan(
        self,
        apply_layer: Callable[..., tuple[Array, Any]],
        x: Array,
        extra: Any,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Array, Any]:
        """Applies all layers: (layer, kind, x, its part of extra) -> (x, output).

        Layers of one kind are one scan. Otherwise the group that repeats is; what is left
        of a last group follows by itself. Without `checkpoint` nothing is recomputed.
        """
        c = self.config
        period, kinds = c.period, c.kinds
        graphdef, lora, frozen = nnx.split(self.layers, nnx.LoRAParam, ...)

        def at(tree: Any, i: Any) -> Any:
            index = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
            return jax.tree.map(lambda leaf: index(leaf, i), tree)

        def run(kind: LayerKind, x: Array, slices: Any) -> tuple[Array, Any]:
            lora, base, part = slices
            return apply_layer(nnx.merge(graphdef, lora, arrive(base)), kind, x, part)

        def run_at(kind: LayerKind, x: Array, slices: Any) -> tuple[Array, Any]:
            # The layer is cut out in here, so that backward cuts it out again: what goes
            # into a checkpointed function is kept, for every layer.
            lora, index, part = slices
            return run(kind, x, (lora, at(frozen, index), part))

        def one(f: Any, kind: LayerKind) -> Callable[[Array, Any], tuple[Array, Any]]:
            f = functools.partial(f, kind)
            if checkpoint is None:
                return f
            # In a scan there is nothing to deduplicate against, so CSE stays allowed.
            return jax.checkpoint(f, policy=_policy(checkpoint), prevent_cse=False)

        micro = x.shape[0] if x.ndim == 4 else 1
        ahead = copies_ahead(c.num_layers, period, micro, checkpoint)
        if ahead and rests_on_host(frozen):

            def apply(lora: Any, base: Any, x: Array, part: Any) -> Array:
                layer = nnx.merge(graphdef, lora, base)
                return apply_layer(layer, kinds[0], x, part)[0]

            on_host = checkpoint == "host"
            x = scan_ahead(apply, x, lora, frozen, extra, inputs_on_host=on_host)
            return x, None

        if period == 1:
            return jax.lax.scan(one(run, kinds[0]), x, (lora, frozen, extra))

        groups = c.num_layers // period
        whole = groups * period
        # What is differentiated, and the caches, go through the scan; the base stays where
        # it is and is read by index, as cutting off the last group would copy it.
        moving = lora, extra
        grouped = jax.tree.map(
            lambda leaf: leaf[:whole].reshape(groups, period, *leaf.shape[1:]), moving
        )

        def body(x: Array, xs: Any) -> tuple[Array, Any]:
            group, (lora, extra) = xs
            outputs = []
            for j in range(period):
                mine = jax.tree.map(lambda leaf, j=j: leaf[j], (lora, extra))
                index = group * period + j
                x, output = one(run_at, kinds[j])(x, (mine[0], index, mine[1]))
                outputs.append(output)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

        x, outputs = jax.lax.scan(body, x, (jnp.arange(groups), grouped))
        outputs = jax.tree.map(
            lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), outputs
        )
        for i in range(whole, c.num_layers):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], moving)
            x, output = one(run_at, kinds[i])(x, (mine[0], i, mine[1]))
            outputs = jax.tree.map(
                lambda leaf, new: jnp.concatenate([leaf, new[None]]), outputs, output
            )
        return x, outputs
