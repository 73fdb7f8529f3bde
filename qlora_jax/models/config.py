"""DecoderConfig: the shape of a decoder."""

import dataclasses
from typing import Literal

from qlora_jax.errors import ConfigError
from qlora_jax.models.spec import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MLPSpec,
    Segment,
    segments,
)
from qlora_jax.nn.rope import Rope, RopeScaling


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
    rotary_dim: int | None = None
    """Features of a head that are rotated, the first ones; None for all."""
    rope_interleaved: bool = False
    """Neighbouring features are rotated with each other (see nn.rope.Rope)."""
    rope_backward: bool = False
    """Heads turn the other way (see nn.rope.Rope)."""
    query_growth: tuple[float, int] | None = None
    """(beta, length): a query is multiplied by 1 + beta * log(1 + position // length)
    (Ministral 3)."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2; Llama's optional attention_bias)."""
    output_bias: bool = False
    """Bias on the attention's output projection (Llama's attention_bias alone)."""
    mlp_bias: bool = False
    """Bias on the linears of feed-forwards (Llama's mlp_bias; gpt-oss's experts)."""
    clamped_swiglu: tuple[float, float] | None = None
    """(alpha, limit): feed-forwards multiply g * sigmoid(alpha g) and up + 1, with g at most
    limit and up within +-limit (gpt-oss); None for `activation`."""
    sliding_window: int | None = None
    """Every layer attends to so many positions, itself included; None for all before it. Where
    layers differ in it, `layers` says it instead."""
    layers: tuple[LayerSpec, ...] = ()
    """One spec a layer; empty where all are the same (see `specs`)."""
    max_position_embeddings: int = 2048
    activation: Literal["silu", "gelu_tanh", "gelu", "relu2"] = "silu"
    gated: bool = True
    """A feed-forward is down(activation(gate(x)) * up(x)); without a gate it is
    down(activation(up(x))) (Arcee, nanochat)."""
    norms: Literal["pre", "post", "both", "parallel"] = "pre"
    """Mixer and feed-forward have a norm before them, after them (OLMo 2), or both (Gemma
    2). With 'parallel' there is one norm before both, and both take what it gives (Cohere)."""
    norm_kind: Literal["rms", "layer", "bare"] = "rms"
    """Norms are RMSNorm, LayerNorm without a bias (Cohere), or RMSNorm without a weight
    (nanochat)."""
    norm_offset: float = 0.0
    """Added to norms' stored weights (1 for Gemma)."""
    embedding_norm: bool = False
    """There is a norm before the first layer too (nanochat)."""
    qk_norm: Literal["none", "head", "all", "rotated"] = "none"
    """A norm on queries and keys: of each head (Qwen3), over all heads (OLMo 2), or of each
    head when it has been rotated (Hunyuan)."""
    value_norm: bool = False
    """RMSNorm without weights on the values of each head (Gemma 4)."""
    attention_gate: bool = False
    """q_proj makes a gate of as many features behind each head's query; what is mixed is
    multiplied by its sigmoid (Qwen3.5)."""
    sinks: bool = False
    """Each head has a score beside those of the tokens, which takes its part of the softmax
    and gives nothing (gpt-oss)."""
    fused_qkv: bool = False
    """One linear for q, k and v (Phi-3)."""
    fused_gate_up: bool = False
    """One linear for gate and up (Phi-3, GLM-4)."""
    attention_scale: float | None = None
    """Attention scores are multiplied by it; None stands for head_dim**-0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """The outputs of mixer and feed-forward are multiplied by it before they are added to the
    residual stream (Granite); 1 in other families."""
    layer_scale: bool = False
    """The residual stream is multiplied by a number of each layer's own behind it (Gemma 4)."""
    per_layer_size: int = 0
    """Each layer takes so many features of a token from per-layer embeddings
    (models/per_layer.py); 0 for none."""
    per_layer_vocab: int = 0
    """The table of per-layer embeddings has so many rows, one a token."""
    logit_scale: float = 1.0
    num_experts: int = 0
    """Feed-forwards to choose from; 0 for one that all tokens take."""
    experts_per_token: int = 2
    normalize_experts: bool = True
    """The chosen experts' weights are scaled to sum to 1 if this is true."""

    def __post_init__(self):
        if self.layers and len(self.layers) != self.num_layers:
            raise ConfigError(
                f"layers has specs for {len(self.layers)} layers, num_layers is "
                f"{self.num_layers}; give one spec a layer, or none where all are the same"
            )

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The spec of each layer."""
        if self.layers:
            return self.layers
        one = LayerSpec(
            mixer=AttentionSpec(window=self.sliding_window),
            feed_forward=ExpertsSpec() if self.num_experts else MLPSpec(),
        )
        return (one,) * self.num_layers

    @property
    def rope(self) -> Rope:
        """The rotation of heads, in features and radians a position, that every layer has whose
        spec names no other; it follows from the fields above and is changed by them."""
        return Rope(
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            dim=self.rotary_dim or self.head_dim,
            interleaved=self.rope_interleaved,
            backward=self.rope_backward,
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments that the layers are stacked and scanned by."""
        return segments(self.specs)

    @property
    def slots(self) -> tuple[tuple[range, LayerSpec], ...]:
        """The layers of each stack, and their spec."""
        return tuple(slot for segment in self.segments for slot in segment.slots())
