"""A layer, and the one loop over all layers.

Every pass over a model's layers, forward and backward, in training and in decoding, is
`through`: a scan over the repeats of each segment, whose body applies a layer of each slot.
Compile time does not grow with depth, and one layer's decoded weights are alive at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
from qlora_jax.models.spec import LayerSpec, Segment
from qlora_jax.models.streaming import at, copies_ahead, scan_ahead
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.norm import Norm
from qlora_jax.nn.variables import arrive, rests_on_host

SAVED = (
    *("q", "k", "v", "mixed", "middle", "gate", "up", "gate_up"),
    *("qkv", "z", "rates"),
    *("unnormed", "lora_hidden", "lora_norms", "lora_unscaled"),
)
"""Activations kept for backward without checkpointing: each matmul's output and the
residual stream. Norms, rotations and the gated product are made again from them."""

IN_TURN = 3
"""A scan's body with at least so many layers recomputes each when its gradient is there. For an
H200 a step of gemma3-1b, which has six, then takes 2.22 GB in place of 2.37; one of
gemma2-2b, which has two, would take 3.48 in place of 3.33."""

Applied = tuple[Array, Any]
"""The residual stream after a layer, and what else came out of it."""


class DecoderLayer(nnx.Module):
    """Mixer and feed-forward, each with its norms, added to the residual stream.

    Attributes:
      config: What all layers of the model share.
      attn: The mixer, whatever it is.
      mlp: The feed-forward.
      attn_norm, mlp_norm: Norms before them, where the config has norms 'pre' or 'both';
        with 'parallel' attn_norm is before both.
      attn_post_norm, mlp_post_norm: Norms after them, with 'post' or 'both'.
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

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        hidden = self.config.hidden_size
        kept = self.attn.kept | self.mlp.kept
        if self.config.norms != "parallel":
            kept["middle"] = hidden
        if self.config.norms in ("post", "both"):
            kept["unnormed"] = kept.get("unnormed", 0) + 2 * hidden
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
    ) -> Applied:
        """Returns the stream after the layer, and what its mixer remembers then.

        Args:
          x: (batch, seq, hidden).
          context: What all layers share.
          cache: What the mixer remembers; None while training.
          key: The random key for LoRA dropout; None switches it off.
        """
        norms, scale = self.config.norms, self.config.residual_scale
        before, after = norms != "post", norms in ("post", "both")
        first = self.attn_norm(x) if before else x
        y, new = self.attn(first, context, cache, key)
        if norms == "parallel":
            return x + scaled(y, scale) + scaled(self.mlp(first, key), scale), new
        y = self.attn_post_norm(checkpoint_name(y, "unnormed")) if after else y
        x = checkpoint_name(x + scaled(y, scale), "middle")
        y = self.mlp(self.mlp_norm(x) if before else x, key)
        y = self.mlp_post_norm(checkpoint_name(y, "unnormed")) if after else y
        return x + scaled(y, scale), new


def scaled(x: Array, scale: float) -> Array:
    """Returns x * scale in x's dtype."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def through(
    segments: Sequence[Segment],
    stacks: Sequence[DecoderLayer],
    x: Array,
    extra: Sequence[Any],
    apply: Callable[[DecoderLayer, Array, Any], Applied],
    checkpoint: Checkpoint | None = None,
) -> tuple[Array, list[Any]]:
    """Applies all layers in order.

    Layers whose weights wait in host memory come to the device when they are due, and one
    turn ahead where `copies_ahead`.

    Args:
      segments: The segments of the model.
      stacks: A stack of layers for each slot of the segments, in their order.
      x: The first layer's input, (batch, seq, hidden), or (micro, batch, seq, hidden).
      extra: For each slot a pytree whose leaves have a leading axis of its layers.
      apply: (one layer, x, its part of extra) -> (x, output).
      checkpoint: What backward recomputes; None where there is no backward, and then
        nothing is arranged for it.

    Returns:
      The last layer's output, and for each slot the outputs of its layers, stacked.
    """
    outputs, first = [], 0
    for segment in segments:
        end = first + len(segment.pattern)
        run = functools.partial(_segment, segment.repeats, apply, checkpoint)
        x, made = run(x, stacks[first:end], extra[first:end])
        outputs += made
        first = end
    return x, outputs


def _segment(
    repeats: int,
    apply: Callable[[DecoderLayer, Array, Any], Applied],
    checkpoint: Checkpoint | None,
    x: Array,
    stacks: Sequence[DecoderLayer],
    extra: Sequence[Any],
) -> tuple[Array, Sequence[Any]]:
    parts = [nnx.split(stack, nnx.LoRAParam, ...) for stack in stacks]
    graphdefs = [part[0] for part in parts]
    lora, frozen = [part[1] for part in parts], [part[2] for part in parts]
    micro = x.shape[0] if x.ndim == 4 else 1
    if rests_on_host(frozen) and copies_ahead(repeats * len(stacks), micro, checkpoint):

        def turn(slot: int, lora: Any, base: Any, x: Array, part: Any) -> Array:
            return apply(nnx.merge(graphdefs[slot], lora, base), x, part)[0]

        on_host = checkpoint == "host"
        x = scan_ahead(turn, x, lora, frozen, extra, inputs_on_host=on_host)
        return x, [None] * len(stacks)

    several, in_turn = len(stacks) > 1, len(stacks) >= IN_TURN

    def one(slot: int, x: Array, slices: Any) -> Applied:
        lora, base, i, part = slices
        if base is None:
            base = at(frozen[slot], i)
        return apply(nnx.merge(graphdefs[slot], lora, arrive(base)), x, part)

    def body(x: Array, slices: Any) -> tuple[Array, list[Any]]:
        outputs = []
        for slot in range(len(stacks)):
            lora, base, part = (part[slot] for part in slices[1:])
            run = checkpointed(functools.partial(one, slot), checkpoint, in_turn)
            x, output = run(x, (lora, base, slices[0], part))
            outputs.append(output)
        return x, outputs

    # The scan cuts a layer out of one stack. Of several it would cut all of a turn's at its
    # beginning, so each layer is cut out when it is due, and again in backward: 16 % less
    # for a step of gemma2-2b beside its arguments (scripts/results/README.md).
    scanned = [None] * len(stacks) if several else frozen
    numbers = jnp.arange(repeats)
    return jax.lax.scan(body, x, (numbers, lora, scanned, list(extra)))


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
