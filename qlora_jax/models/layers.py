"""A layer, and the one loop over all layers.

Every pass over a model's layers, forward and backward, in training and in decoding, is
`through`: a scan over the repeats of each segment, whose body applies a layer of each slot.
Compile time does not grow with depth, and one layer's decoded weights are alive at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from qlora_jax.config.train import Checkpoint
from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.feed_forward import FEED_FORWARDS
from qlora_jax.models.mixers import MIXERS
from qlora_jax.models.per_layer import PerLayerGate
from qlora_jax.models.spec import LayerSpec, Segment
from qlora_jax.models.streaming import at, copies_ahead, scan_ahead
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.norm import Norm
from qlora_jax.nn.variables import arrive, rests_on_host
from qlora_jax.nn.vector import Vector

SAVED = (
    *("q", "k", "v", "mixed", "middle", "gate", "up", "gate_up"),
    *("qkv", "z", "rates", "per_layer"),
    *("unnormed", "lora_hidden", "lora_norms", "lora_unscaled"),
)
"""Activations kept for backward without checkpointing: each matmul's output and the
residual stream. Norms, rotations and the gated product are made again from them."""

IN_TURN = 3
"""A scan's body with at least so many layers recomputes each when its gradient is there. For an
H200 a step of gemma3-1b, which has six, then takes 2.22 GB in place of 2.37; one of
gemma2-2b, which has two, would take 3.48 in place of 3.33."""


class Applied(NamedTuple):
    """What comes out of a layer.

    Attributes:
      x: The residual stream after it.
      output: What the caller of `through` wants of each layer.
      remembered: What its mixer remembers; only that of a layer that gives it is used.
    """

    x: Array
    output: Any
    remembered: Any


Given = dict[str, Any]
"""What earlier layers remember, by the names that they give it."""


class DecoderLayer(nnx.Module):
    """Mixer and feed-forward, each with its norms, added to the residual stream.

    Attributes:
      config: What all layers of the model share.
      attn: The mixer, whatever it is.
      mlp: The feed-forward.
      attn_norm, mlp_norm: Norms before them, where the config has norms 'pre' or 'both';
        with 'parallel' attn_norm is before both.
      attn_post_norm, mlp_post_norm: Norms after them, with 'post' or 'both'.
      per_layer: PerLayerGate, where layers have per-layer inputs.
      scale: Vector of one number, which the stream is multiplied by behind the layer, where
        the config has layer_scale.
    """

    def __init__(
        self,
        spec: LayerSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        hidden = config.hidden_size
        self.config = config
        if config.norms != "post":
            self.attn_norm = norm(hidden)
        if config.norms in ("pre", "both"):
            self.mlp_norm = norm(hidden)
        if config.norms in ("post", "both"):
            self.attn_post_norm = norm(hidden)
            self.mlp_post_norm = norm(hidden)
        self.attn = MIXERS[type(spec.mixer)](spec.mixer, config, linear, norm, normal)
        make = FEED_FORWARDS[type(spec.feed_forward)]
        self.mlp = make(spec.feed_forward, config, linear, normal)
        if config.per_layer_size:
            self.per_layer = PerLayerGate(config, linear, norm)
        if config.layer_scale:
            self.scale = Vector(jnp.ones_like(normal(1)))

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        hidden = self.config.hidden_size
        kept = self.attn.kept | self.mlp.kept
        if self.config.norms != "parallel":
            kept["middle"] = hidden
        if self.config.norms in ("post", "both"):
            kept["unnormed"] = kept.get("unnormed", 0) + 2 * hidden
        if self.config.per_layer_size:
            for name, features in self.per_layer.kept.items():
                kept[name] = kept.get(name, 0) + features
        if unknown := kept.keys() - {*SAVED}:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no checkpoint name that backward keeps; "
                f"use one of SAVED ({', '.join(SAVED)}), or add it there"
            )
        return kept

    def __call__(
        self,
        x: Array,
        context: Context,
        cache: Any = None,
        key: Array | None = None,
        per_layer_input: Array | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, Any, Array | None]:
        """Returns the stream after the layer, what its mixer remembers then, and its load.

        Args:
          x: (batch, seq, hidden).
          context: What all layers share.
          cache: What the mixer remembers; None while training.
          key: The random key for LoRA dropout; None switches it off.
          per_layer_input: Its part of per-layer embeddings, (batch, seq, features), where the
            model has them (models/per_layer.py).
          counted: 1 for each token, (batch, seq), that counts in the load of a router, 0 for
            padding. None asks for no load, and there is none of a layer without a router.
        """
        norms, scale = self.config.norms, self.config.residual_scale
        before, after = norms != "post", norms in ("post", "both")
        first = self.attn_norm(x) if before else x
        y, new = self.attn(first, context, cache, key)
        if norms == "parallel":
            load = self._load(first, x, counted)
            x = x + scaled(y, scale) + scaled(self.mlp(first, key), scale)
        else:
            y = self.attn_post_norm(checkpoint_name(y, "unnormed")) if after else y
            x = checkpoint_name(x + scaled(y, scale), "middle")
            y = self.mlp_norm(x) if before else x
            load = self._load(y, x, counted)
            sees_stream = getattr(self.mlp, "STREAM", False)
            y = self.mlp(y, key, x) if sees_stream else self.mlp(y, key)
            y = self.mlp_post_norm(checkpoint_name(y, "unnormed")) if after else y
            x = x + scaled(y, scale)
        if per_layer_input is not None:
            x = self.per_layer(x, per_layer_input, key)
        if self.config.layer_scale:
            x = x * self.scale.weight[...].astype(x.dtype)
        return x, new, load

    def _load(self, x: Array, stream: Array, counted: Array | None) -> Array | None:
        """Returns how a router shares out tokens; None where none does, or nobody asks."""
        if counted is None or not hasattr(self.mlp, "load"):
            return None
        return self.mlp.load(x, stream, counted)


def scaled(x: Array, scale: float) -> Array:
    """Returns x * scale in x's dtype."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


Apply = Callable[[DecoderLayer, Array, Given, Any, Any], Applied]
"""(one layer, x, what is given, its part of extra, its per-layer input) -> what comes out."""


def through(
    segments: Sequence[Segment],
    stacks: Sequence[DecoderLayer],
    x: Array,
    extra: Sequence[Any],
    per_layer: Sequence[Any],
    apply: Apply,
    checkpoint: Checkpoint | None = None,
    keeps_outputs: bool = False,
) -> tuple[Array, list[Any]]:
    """Applies all layers in order.

    Layers whose weights wait in host memory come to the device when they are due, and one
    turn ahead where `copies_ahead`.

    Args:
      segments: The segments of the model.
      stacks: A stack of layers for each slot of the segments, in their order.
      x: The first layer's input, (batch, seq, hidden), or (micro, batch, seq, hidden).
      extra: For each slot a pytree whose leaves have a leading axis of its layers.
      per_layer: The same, of per-layer inputs, which are differentiated.
      apply: Applies one layer.
      checkpoint: What backward recomputes; None where there is no backward, and then
        nothing is arranged for it.
      keeps_outputs: Whether the outputs are wanted where there is a backward. Layers from host
        memory then come when they are due, and none is copied ahead.

    Returns:
      The last layer's output, and for each slot the outputs of its layers, stacked.
    """
    outputs, first, given = [], 0, {}
    for segment in segments:
        end = first + len(segment.pattern)
        run = functools.partial(_segment, segment, apply, checkpoint, keeps_outputs)
        slots = (each[first:end] for each in (stacks, extra, per_layer))
        x, made, more = run(x, given, *slots)
        outputs += made
        given, first = given | more, end
    return x, outputs


def _segment(
    segment: Segment,
    apply: Apply,
    checkpoint: Checkpoint | None,
    keeps_outputs: bool,
    x: Array,
    given: Given,
    stacks: Sequence[DecoderLayer],
    extra: Sequence[Any],
    per_layer: Sequence[Any],
) -> tuple[Array, Sequence[Any], Given]:
    parts = [nnx.split(stack, nnx.LoRAParam, ...) for stack in stacks]
    graphdefs = [part[0] for part in parts]
    lora, frozen = [part[1] for part in parts], [part[2] for part in parts]
    repeats, names = segment.repeats, [spec.gives for spec in segment.pattern]
    micro = x.shape[0] if x.ndim == 4 else 1
    ahead = copies_ahead(repeats * len(stacks), micro, checkpoint)
    # Layers that give come without copying ahead: they are few, and only x leaves that.
    if rests_on_host(frozen) and ahead and not any(names) and not keeps_outputs:

        def turn(
            slot: int, trained: Any, base: Any, x: Array, given: Given, part: Any
        ) -> Array:
            own, per_layer = trained
            layer = nnx.merge(graphdefs[slot], own, base)
            return apply(layer, x, given, part, per_layer).x

        on_host, trained = checkpoint == "host", list(zip(lora, per_layer, strict=True))
        x = scan_ahead(turn, x, given, trained, frozen, extra, inputs_on_host=on_host)
        return x, [None] * len(stacks), {}

    several, in_turn = len(stacks) > 1, len(stacks) >= IN_TURN

    def one(slot: int, x: Array, given: Given, slices: Any) -> Applied:
        i, lora, base, part, per_layer = slices
        if base is None:
            base = at(frozen[slot], i)
        layer = nnx.merge(graphdefs[slot], lora, arrive(base))
        made = apply(layer, x, given, part, per_layer)
        return made if names[slot] else made._replace(remembered=None)

    def body(x: Array, slices: Any) -> tuple[Array, tuple[list[Any], Given]]:
        outputs, gives = [], {}
        for slot, name in enumerate(names):
            own = (slices[0], *(part[slot] for part in slices[1:]))
            run = checkpointed(functools.partial(one, slot), checkpoint, in_turn)
            x, output, remembered = run(x, given | gives, own)
            outputs.append(output)
            if name is not None:
                gives[name] = remembered
        return x, (outputs, gives)

    # The scan cuts a layer out of one stack. Of several it would cut all of a turn's at its
    # beginning, so each layer is cut out when it is due, and again in backward: 16 % less
    # for a step of gemma2-2b beside its arguments (scripts/results/README.md).
    scanned = [None] * len(stacks) if several else frozen
    numbers = jnp.arange(repeats)
    x, (outputs, gives) = jax.lax.scan(
        body, x, (numbers, lora, scanned, list(extra), list(per_layer))
    )
    return x, outputs, jax.tree.map(lambda leaf: leaf[0], gives)


def checkpointed(
    f: Callable[..., Any], checkpoint: Checkpoint | None, in_turn: bool = False
) -> Any:
    """Returns a function of a scan's body whose backward recomputes what a policy says.

    Args:
      f: The function.
      checkpoint: The policy; None where there is no backward.
      in_turn: Whether recomputing waits for the gradient that it is for. Where a body has
        several such functions it would else begin for all of them at once.
    """
    if checkpoint is None:
        return f
    # Alone in a scan there is nothing to deduplicate against, so CSE stays allowed.
    return jax.checkpoint(f, policy=_policy(checkpoint), prevent_cse=in_turn)


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
