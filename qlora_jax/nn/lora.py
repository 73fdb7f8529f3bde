"""LoRA: a trainable low-rank update beside a frozen linear.

Source: Hu et al., arXiv 2106.09685; initialised as PEFT does (peft/tuners/lora/layer.py:
lora_A kaiming_uniform with a=sqrt(5), lora_B zero).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.nn.linear import Linear, QuantizedLinear
from qlora_jax.nn.matmul import factor_matmul

Init = Literal["zero", "loftq", "qera-diagonal", "qera"]
"""How an adapter starts: changing nothing, or making up for what quantization lost
(adapters/compensate.py)."""


class LoRA(nnx.Module):
    """A frozen linear with an adapter: y = base(x) + scale * (drop(x) @ a) @ b.

    Attributes:
      base: The linear it wraps, dense or quantized.
      lora_a: nnx.LoRAParam, float32 (..., in, rank), uniform in +-1/sqrt(in).
      lora_b: nnx.LoRAParam, float32 (..., rank, out), zero: a new adapter changes
        nothing.
      scale: alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732).
      dropout: Probability that an input feature of the adapter is dropped.
      init: How the factors started; unless 'zero', they hold a part of the base.
    """

    def __init__(
        self,
        base: Linear | QuantizedLinear,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        init: Init = "zero",
        rslora: bool = False,
        key: Array,
    ):
        # in + out comes from the kernel's static shape, so a stack works unsliced.
        bound = 1 / math.sqrt(base.in_features)
        shape = (*base.stack, base.in_features, rank)
        self.base = base
        self.lora_a = nnx.LoRAParam(
            jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        )
        self.lora_b = nnx.LoRAParam(
            jnp.zeros((*base.stack, rank, base.out_features), jnp.float32)
        )
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.init: Init = init
        self.rslora = rslora

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def in_features(self) -> int:
        """Size of the last axis of an input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the last axis of an output."""
        return self.base.out_features

    def __call__(
        self, x: Float[Array, "*batch in"], *, key: Array | None = None
    ) -> Float[Array, "*batch out"]:
        """Applies base and adapter in x's dtype; dropout only when a key is given."""
        dropped = key is not None and self.dropout > 0
        if isinstance(self.base, QuantizedLinear) and not dropped:
            return self.base(
                x, adapter=(self.lora_a[...], self.lora_b[...], self.scale)
            )
        hidden = x
        if dropped:
            assert key is not None
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            hidden = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        hidden = hidden.reshape(-1, x.shape[-1])
        hidden = checkpoint_name(factor_matmul(hidden, self.lora_a[...]), "lora_hidden")
        update = factor_matmul(hidden, self.lora_b[...]) * jnp.asarray(
            self.scale, x.dtype
        )
        return self.base(x) + update.reshape(*x.shape[:-1], -1)
