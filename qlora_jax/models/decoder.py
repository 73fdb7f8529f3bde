"""One decoder-only transformer, configured for each family."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError
from qlora_jax.models.cache import Cache, Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.head import Head
from qlora_jax.models.layers import (
    Applied,
    DecoderLayer,
    Given,
    checkpointed,
    scaled,
    through,
)
from qlora_jax.models.per_layer import PerLayerInputs
from qlora_jax.models.spec import LayerSpec
from qlora_jax.names import stack_key
from qlora_jax.nn.documents import places_of
from qlora_jax.nn.embedding import Embedding
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.norm import BareNorm, LayerNorm, Norm, RMSNorm


class Decoder(nnx.Module):
    """Tokens to logits.

    Attributes:
      config: Its shape.
      dtype: Name of the compute dtype, that of activations and matmuls.
      embed_tokens: The Embedding.
      per_layer: PerLayerInputs, where the model has per-layer embeddings, else None.
      layers: A DecoderLayer, every array with a leading axis of layers; where layers are of
        several kinds, an nnx.Dict of one such stack a slot of the config's segments, by the
        key that says which layers it holds (names.py). `stacks` has them in order.
      embed_norm: The norm before the first layer, or None where there is none.
      norm: The final norm.
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
        slots = config.slots
        keys = iter(jax.random.split(key, 24 * len(slots)))

        def normal(*shape: int) -> Array:
            return (0.02 * jax.random.normal(next(keys), shape)).astype(dtype)

        def norm(
            features: int,
            offset: float = config.norm_offset,
            eps: float = config.rms_norm_eps,
            groups: int = 1,
            stack: tuple[int, ...] = (),
        ) -> Norm:
            if config.norm_kind == "bare":
                return BareNorm(eps)
            kind = LayerNorm if config.norm_kind == "layer" else RMSNorm
            weight = jnp.full((*stack, features), 1 - offset, dtype)
            return kind(weight, eps, offset, groups)

        def stacked(layers: range, spec: LayerSpec) -> DecoderLayer:
            count = (len(layers),)

            def linear(
                out: int, features: int, bias: bool, stack: tuple[int, ...] = ()
            ) -> Linear:
                stack = (*count, *stack)
                kernel = normal(*stack, out, features)
                return Linear(kernel, jnp.zeros((*stack, out), dtype) if bias else None)

            return DecoderLayer(
                spec,
                config,
                linear,
                functools.partial(norm, stack=count),
                functools.partial(normal, *count),
            )

        self.dtype = jnp.dtype(dtype).name
        self.embed_tokens: Any = Embedding(
            normal(config.vocab_size, config.hidden_size)
        )
        first = norm(config.hidden_size) if config.embedding_norm else None
        self.embed_norm = nnx.data(first)
        per_layer = None
        if config.per_layer_size:
            per_layer = PerLayerInputs(config, norm, normal)
        self.per_layer: Any = nnx.data(per_layer)
        made = {stack_key(layers): stacked(layers, spec) for layers, spec in slots}
        self.layers: Any = (
            nnx.Dict(made) if len(made) > 1 else next(iter(made.values()))
        )
        self.norm = norm(config.hidden_size)
        head = None
        if not config.tie_word_embeddings:
            head = Linear(normal(config.vocab_size, config.hidden_size))
        self.lm_head = nnx.data(head)

    @property
    def stacks(self) -> list[DecoderLayer]:
        """The stack of layers of each slot of the config's segments."""
        if isinstance(self.layers, DecoderLayer):
            return [self.layers]
        return [self.layers[stack_key(layers)] for layers, _ in self.config.slots]

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
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Returns float32 logits of every position; see `hidden_states`."""
        hidden = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids
        )
        return self.logits(hidden)

    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Applies the head to normed hidden states; float32."""
        return self.head(hidden).astype(jnp.float32)

    def hidden_states(
        self,
        tokens: Int[Array, "*micro batch seq"],
        *,
        positions: Int[Array, "*micro batch seq"] | None = None,
        segment_ids: Int[Array, "*micro batch seq"] | None = None,
        key: Array | None = None,
        checkpoint: Checkpoint = "none",
    ) -> Float[Array, "*micro batch seq hidden"]:
        """Returns the final normed hidden states, what the head takes.

        Args:
          tokens: Token ids. Padding belongs to the right, where causality hides it. With
            a third axis in front, each layer goes over all micro-batches before the next:
            a layer that comes from host memory comes once for all of them.
          positions: Where rows hold several documents, 0, 1, 2, ... in each: a token sees
            those of its own document alone, in attention and in any other mixer. None
            where each row is one document.
          segment_ids: Another way to say it: each document's tokens have one number. With
            both, these tell documents apart, and positions are what heads are rotated by.
          key: The random key for LoRA dropout; None switches it off.
          checkpoint: What backward recomputes.
        """
        options = {"positions": positions, "segment_ids": segment_ids}
        return self._states(tokens, None, key, checkpoint, **options)[0]

    def routed(
        self,
        tokens: Int[Array, "*micro batch seq"],
        counted: Float[Array, "*micro batch seq"],
        *,
        positions: Int[Array, "*micro batch seq"] | None = None,
        segment_ids: Int[Array, "*micro batch seq"] | None = None,
        key: Array | None = None,
        checkpoint: Checkpoint = "none",
    ) -> tuple[
        Float[Array, "*micro batch seq hidden"], Float[Array, "*micro 2 experts"]
    ]:
        """Returns what `hidden_states` does, and the mean load of the routers of all layers.

        Args:
          tokens: See `hidden_states`.
          counted: 1 for a token that counts in the load, 0 for padding.
          positions, segment_ids, key, checkpoint: See `hidden_states`.

        Raises:
          ConfigError: no layer has a router.
        """
        options = {"positions": positions, "segment_ids": segment_ids}
        x, outputs = self._states(tokens, counted, key, checkpoint, **options)
        loads = [load for load in outputs if load is not None]
        if not loads:
            raise ConfigError(
                f"this {self.config.model_type} has no experts that tokens are routed to, and "
                "the load of its routers is asked for; set router_aux_loss to 0"
            )
        return x, jnp.mean(jnp.concatenate(loads), axis=0)

    def _states(
        self,
        tokens: Array,
        counted: Array | None,
        key: Array | None,
        checkpoint: Checkpoint,
        positions: Array | None,
        segment_ids: Array | None,
    ) -> tuple[Array, list[Any]]:
        """Returns the final hidden states, and the loads of each slot's layers."""
        *micro, batch, seq = tokens.shape
        context = self._context((batch, seq), positions, segment_ids)
        # Micro-batches differ in it where their rows hold several documents.
        own = None
        if micro and context.documents is not None:
            made = context.positions, context.documents, [*context.shared.values()]
            own = jax.tree.map(lambda y: y.reshape(*micro, batch, *y.shape[1:]), made)

        def apply(
            layer: DecoderLayer,
            x: Array,
            given: Given,
            key: Array | None,
            per_layer: Any,
        ) -> Applied:
            x = checkpoint_name(x, "layer_input")

            def one(
                x: Array,
                given: Given,
                key: Any,
                per_layer: Any,
                counted: Any,
                own: Any = None,
            ) -> Any:
                sees = dataclasses.replace(context, given=given)
                if own is not None:
                    positions, documents, values = own
                    shared = dict(zip(context.shared, values, strict=True))
                    sees = Context(positions, shared, given=given, documents=documents)
                return layer(x, sees, None, key, per_layer, counted)

            def turn(_: None, xs: Any) -> tuple[None, Any]:
                return None, one(*xs)

            if not micro:
                x, remembered, load = one(x, given, key, per_layer, counted)
                return Applied(x, load, remembered)
            if checkpoint != "none":
                # Else backward would make again what all micro-batches keep, at once.
                turn = checkpointed(turn, checkpoint)
            # From the last on, so that backward adds up gradients from the first.
            xs = x, given, key, per_layer, counted, own
            x, remembered, load = jax.lax.scan(turn, None, xs, reverse=True)[1]
            return Applied(x, load, remembered)

        x = self._embed(tokens.reshape(-1, seq))
        x = x.reshape(*tokens.shape, -1)
        per_layer = self._per_layer_inputs(tokens, x, key)
        keys = self._layer_keys(key, micro)
        loads = counted is not None
        x, outputs = self._through(x, keys, per_layer, apply, checkpoint, loads)
        return self.norm(x), outputs

    def finite(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> dict[str, Any]:
        """Says what of a forward pass is finite, to find where a NaN or Inf begins.

        Args:
          tokens, positions, segment_ids: See `hidden_states`.

        Returns:
          A bool for the output of `embed_tokens`, `norm` and `head`; and under `layers` for
          each of `config.slots` an array of bools, one a layer's output.
        """
        context = self._context(tokens.shape, positions, segment_ids)

        def apply(
            layer: DecoderLayer, x: Array, given: Given, _: Any, per_layer: Any
        ) -> Applied:
            sees = dataclasses.replace(context, given=given)
            x, remembered, _ = layer(x, sees, None, None, per_layer)
            return Applied(x, jnp.isfinite(x).all(), remembered)

        found: dict[str, Any] = {}
        x = self._embed(tokens)
        found["embed_tokens"] = jnp.isfinite(x).all()
        per_layer, nothing = (
            self._per_layer_inputs(tokens, x),
            [None] * len(self.stacks),
        )
        x, found["layers"] = self._through(x, nothing, per_layer, apply)
        x = self.norm(x)
        found["norm"] = jnp.isfinite(x).all()
        found["head"] = jnp.isfinite(self.logits(x[:, -1])).all()
        return found

    def _layer_keys(self, key: Array | None, micro: list[int]) -> list[Array | None]:
        """Returns each slot's keys, one a layer, or one a layer and micro-batch."""
        slots = self.config.slots
        if key is None:
            return [None] * len(slots)
        split = functools.partial(jax.random.split, num=self.config.num_layers)
        keys = split(key)
        if micro:
            keys = jax.vmap(split, out_axes=1)(_micro_keys(key, micro[0]))
        return [keys[i.start : i.stop : i.step] for i, _ in slots]

    def decode(
        self, tokens: Int[Array, "batch seq"], positions: Array, cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Continues from a cache: prefill (seq > 1) or one step (seq 1).

        Args:
          tokens: The next tokens; padding belongs to the left.
          positions: int32 (batch, seq); -1 for padding.
          cache: The cache from `empty_cache`, or from the last call.

        Returns:
          Float32 logits after the last token, and the cache with the tokens added.
        """
        seen = jax.lax.dynamic_update_slice_in_dim(
            cache.positions, positions, cache.length, axis=1
        )
        context = Context(positions, self._shared(positions), seen, cache.length)

        def apply(
            layer: DecoderLayer, x: Array, given: Given, own: Any, per_layer: Any
        ) -> Applied:
            sees = dataclasses.replace(context, given=given)
            x, new, _ = layer(x, sees, own, None, per_layer)
            return Applied(x, new, new)

        x = self._embed(tokens)
        x, layers = self._through(
            x, cache.layers, self._per_layer_inputs(tokens, x), apply
        )
        logits = self.logits(self.norm(x[:, -1]))
        return logits, Cache(layers, seen, cache.length + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a cache for `capacity` tokens a row, in the compute dtype."""
        layers = []
        for (numbers, _), stack in zip(self.config.slots, self.stacks, strict=True):
            own = stack.attn.empty_cache(batch, capacity, self.compute_dtype)
            count = len(numbers)
            layers.append(
                jax.tree.map(lambda x, n=count: jnp.tile(x, (n, *[1] * x.ndim)), own)
            )
        nothing = jnp.full((batch, capacity), -1, jnp.int32)
        return Cache(layers, nothing, jnp.int32(0))

    def _embed(self, tokens: Array) -> Array:
        x = self.embed_tokens(tokens).astype(self.compute_dtype)
        x = scaled(x, self.config.embedding_scale)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _per_layer_inputs(
        self, tokens: Array, x: Array, key: Array | None = None
    ) -> list[Any]:
        """Returns the per-layer inputs of each slot's layers; None where the model has none.

        Args:
          tokens: (batch, seq), or (micro, batch, seq).
          x: Their embeddings.
          key: The random key for LoRA dropout.
        """
        slots = self.config.slots
        if self.per_layer is None:
            return [None] * len(slots)
        if key is not None:  # beyond those of the layers
            key = jax.random.fold_in(key, self.config.num_layers)
        if tokens.ndim == 3:
            each = tokens, x, None if key is None else _micro_keys(key, len(tokens))
            per_layer = jax.lax.map(lambda one: self.per_layer(*one), each)
            per_layer = per_layer.swapaxes(0, 1)
        else:
            per_layer = self.per_layer(tokens, x, key)
        return [per_layer[i.start : i.stop : i.step] for i, _ in slots]

    def _context(
        self,
        shape: tuple[int, ...],
        positions: Array | None,
        segment_ids: Array | None,
    ) -> Context:
        """Returns what layers share of whole rows, which may hold several documents.

        Args:
          shape: (batch, seq): that of what it returns where rows are one document each.
          positions, segment_ids: See `hidden_states`; micro-batches follow one another.
        """
        documents = places_of(positions, segment_ids)
        if documents is not None:
            documents = documents.reshape(-1, shape[1])
            along = documents
            if positions is not None:
                along = positions.reshape(documents.shape)
        else:
            along = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return Context(along, self._shared(along), documents=documents)

    def _shared(self, positions: Array) -> dict[Any, Any]:
        """Returns what mixers need that depends on positions alone."""
        shared: dict[Any, Any] = {}
        for stack in self.stacks:
            shared |= stack.attn.shared(positions)
        return shared

    def _through(
        self,
        x: Array,
        extra: list[Any],
        per_layer: list[Any],
        apply: Callable[..., Applied],
        checkpoint: Checkpoint | None = None,
        keeps_outputs: bool = False,
    ) -> tuple[Array, list[Any]]:
        where = self.config.segments, self.stacks
        how = apply, checkpoint, keeps_outputs
        return through(*where, x, extra, per_layer, *how)


def _micro_keys(key: Array, count: int) -> Array:
    """Returns a key for each micro-batch, as a step has it that takes one at a time."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
