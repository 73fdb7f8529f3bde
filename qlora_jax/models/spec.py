"""What a model's layers are: specs, and the segments that they are stacked and scanned by.

A layer has a mixer, which mixes positions, and a feed-forward, which does not. Their specs say
which module each is and what of it differs between the layers of one model; what layers share
(sizes, biases, norms) is in DecoderConfig. Which module a spec stands for is in the tables of
`mixers` and `feed_forward`.

Layers that follow each other in a repeated pattern are a **segment**. Each **slot** of the
pattern has parameters of its own, stacked over the repeats: layers of one slot have the same
spec and so arrays of one shape.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from qlora_jax.nn.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention over all positions before a token, or over a window of them."""

    window: int | None = None
    """Positions that a token sees, itself included; None for all before it."""

    rope: Rope | Literal["global", "none"] = "global"
    """Heads are rotated as DecoderConfig.rope says ("global"), in a way of the layer's own, or
    not at all ("none")."""

    head_dim: int | None = None
    """Features of a head; None for DecoderConfig.head_dim."""

    kv_heads: int | None = None
    """Heads of keys and values; None for DecoderConfig.num_kv_heads."""

    keys_as_values: bool = False
    """Values are what k_proj makes, before keys are normed and rotated (Gemma 4)."""

    gives: str | None = None
    """The name under which later layers find this layer's keys and values (Gemma 4 E2B). It
    is given once in a model, so that the layer is a slot of its own, of one repeat."""

    takes: str | None = None
    """The name of an earlier layer's keys and values, which this one attends to in place of
    its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """The gated delta net; sizes in heads and features of a head."""

    fused: bool = False
    """One linear for queries, keys, values and the gate, and one for rates and decays, each
    with all of a key head together (Qwen3-Next)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    """Tokens that the convolution reaches over, itself included."""

    @property
    def key_size(self) -> int:
        """Features of all keys of a token, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Features of all values of a token."""
        return self.value_heads * self.value_dim

    @property
    def qkv_size(self) -> int:
        """Features that the convolution goes over."""
        return 2 * self.key_size + self.value_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """A short convolution between two gates (LFM2)."""

    taps: int = 3
    """Tokens that it reaches over, itself included."""

    bias: bool = False
    """Its linears and the convolution have biases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """A Mamba 2 layer; sizes in heads and features of a head."""

    heads: int
    head_dim: int
    state_dim: int
    """Features of the keys by which a state is written and read."""

    groups: int = 1
    """Keys and queries of a token; each serves heads / groups heads."""

    taps: int = 4
    """Tokens that the convolution reaches over, itself included."""

    conv_bias: bool = True
    bias: bool = False
    """Its linears have biases."""

    @property
    def inner_size(self) -> int:
        """Features of all heads."""
        return self.heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Features that the convolution goes over."""
        return self.inner_size + 2 * self.groups * self.state_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Attention whose keys and values are made of a small vector a token (DeepSeek V2).

    DecoderConfig.head_dim is that of queries and keys; of it the last `rotary_dim` features
    are rotated, and those of keys are the same for all heads.
    """

    query_rank: int | None
    """Features that queries are made of; None where they are made of the input itself."""

    latent_rank: int
    """Features that keys, but for what is rotated, and values are made of."""

    value_dim: int
    """Features of a head's value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """One gated feed-forward that all tokens take."""

    intermediate_size: int | None = None
    """Its width; None for DecoderConfig.intermediate_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A router and the config's num_experts feed-forwards, of which each token takes some."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Weights are a softmax over the router's outputs, or a sigmoid of each."""

    router_bias: bool = False
    """The router's linear has a bias (gpt-oss)."""

    correction: int = 0
    """Experts are chosen by their weights and a number of their own, which the weights of
    the chosen are without (DeepSeek V3): the axes that the files have it with; 0 for none."""

    groups: int = 1
    """Groups that the experts are in; those of `top_groups` of them alone can be chosen."""

    top_groups: int = 1
    """Groups that a token's experts are chosen from: those whose best experts sum to the
    most."""

    best_of_group: int = 2
    """That sum is of so many of a group's best experts: two (DeepSeek V3), or one (V2)."""

    scale: float = 1.0
    """The chosen experts' weights are multiplied by it."""

    sum_offset: float = 0.0
    """It is added to the sum of the chosen experts' weights before they are divided by that sum
    (LFM2)."""

    shared_size: int = 0
    """Width of a feed-forward beside the experts that all tokens take; 0 for none."""

    shared_gate: bool = False
    """What the shared feed-forward gives is multiplied by a sigmoid of a linear (Qwen)."""

    expert_scales: bool = False
    """At last each expert's weight is multiplied by a number of its own (Gemma 4)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideSpec:
    """One gated feed-forward that all tokens take, and beside it a mixture; each has norms of
    its own before and after it, and the router one before it (Gemma 4)."""

    own_size: int
    """Width of the feed-forward; the experts' is DecoderConfig.intermediate_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer of a model."""

    mixer: Any = AttentionSpec()
    """Spec of what mixes positions; a key of `mixers.MIXERS` is its class."""

    feed_forward: Any = MLPSpec()
    """Spec of what does not; a key of `feed_forward.FEED_FORWARDS` is its class."""

    dense: tuple[str, ...] = ()
    """Paths in the layer of linears that a 4-bit folder keeps dense, such as
    "mlp.down_proj". Layers that store a linear differently cannot be one stack."""

    @property
    def gives(self) -> str | None:
        """The name under which later layers find what the mixer remembers; None for none."""
        return getattr(self.mixer, "gives", None)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that follow each other, by a pattern that repeats.

    Attributes:
      start: Number of its first layer.
      pattern: One spec a slot.
      repeats: The number of times that the pattern comes.
    """

    start: int
    pattern: tuple[LayerSpec, ...]
    repeats: int

    def layers(self, slot: int) -> range:
        """Returns the numbers of the layers that a slot's stack holds."""
        step = len(self.pattern)
        if self.repeats == 1:
            return range(self.start + slot, self.start + slot + 1)
        return range(self.start + slot, self.start + self.repeats * step, step)

    def slots(self) -> Iterator[tuple[range, LayerSpec]]:
        """Yields the layers of each slot, and its spec."""
        for slot, spec in enumerate(self.pattern):
            yield self.layers(slot), spec


@functools.lru_cache(maxsize=64)
def segments(layers: tuple[LayerSpec, ...]) -> tuple[Segment, ...]:
    """Returns the segments with the fewest slots in all; of equals, the fewest segments, and
    of these the ones of which the first is longest.

    Each slot is compiled once, so this is what makes compile time independent of depth. It
    takes about n**2 log n comparisons for n layers.

    Args:
      layers: A spec for each layer.
    """
    count = len(layers)
    kinds = [layers.index(layer) for layer in layers]
    # The best way to cover the layers from each one on: (slots, segments), and how it begins.
    best: list[tuple[int, int]] = [(0, 0)] * (count + 1)
    first: list[tuple[int, int]] = [(0, 0)] * (count + 1)
    for start in reversed(range(count)):
        options = []
        for size in range(1, count - start + 1):
            for repeats in range(1, _repeats(kinds, start, size) + 1):
                slots, parts = best[start + size * repeats]
                options.append(((slots + size, parts + 1), (size, repeats)))
        best[start], first[start] = min(
            options, key=lambda option: (option[0], -option[1][0] * option[1][1])
        )
    found, start = [], 0
    while start < count:
        size, repeats = first[start]
        found.append(Segment(start, layers[start : start + size], repeats))
        start += size * repeats
    return tuple(found)


def _repeats(kinds: Sequence[int], start: int, size: int) -> int:
    """Returns how often the pattern of this size at a place comes there in a row."""
    pattern, repeats = kinds[start : start + size], 1
    while kinds[start + repeats * size : start + (repeats + 1) * size] == pattern:
        repeats += 1
    return repeats
