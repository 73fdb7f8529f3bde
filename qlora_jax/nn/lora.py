"""LoRA: a trainable low-rank update beside a frozen linear.

Source: Hu et al., arXiv 2106.09685; initialised as PEFT does (peft/tuners/lora/layer.py:
lora_A kaiming_uniform with a=sqrt(5), lora_B zero).
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.config.lora import Init
from qlora_jax.nn.dora import adapted_norms, row_norms
from qlora_jax.nn.folding import Applied, Factors, Folding
from qlora_jax.nn.frozen import Adapted, Parts
from qlora_jax.nn.linear import FrozenLinear, add_bias, low_rank
from qlora_jax.nn.variables import FrozenParam


class LoRA(Adapted):
    """A frozen linear with an adapter: y = base(x) + scale * (drop(x) @ a) @ b.

    Attributes:
      base: The linear it wraps, dense or quantized.
      lora_a: nnx.LoRAParam, float32 (..., in, rank), uniform in +-1/sqrt(in).
      lora_b: nnx.LoRAParam, float32 (..., rank, out), zero: a new adapter changes
        nothing.
      magnitude: nnx.LoRAParam, float32 (..., out), with DoRA (nn/dora.py), else None.
      squared_norms: FrozenParam, float32 (..., out), of the base's rows, with DoRA.
      active: FrozenParam, float32 (..., 1, 1), 0 in layers of a stack without adapter;
        None where all have one.
      scale: alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732).
      dropout: Probability that an input feature of the adapter is dropped.
      init: The way that the factors started; unless it is 'zero', they hold a part of the
        base.
    """

    PARTS = ("lora_a", "lora_b", "magnitude", "active")
    AXES: ClassVar = {
        "lora_a": ("in", "rank"),
        "lora_b": ("rank", "out"),
        "magnitude": ("out",),
        "squared_norms": ("out",),
    }
    base: FrozenLinear

    def __init__(
        self,
        base: FrozenLinear,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        init: Init = "zero",
        rslora: bool = False,
        dora: bool = False,
        layers: tuple[int, ...] = (),
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
        norms = row_norms(base) if dora else None
        self.squared_norms = nnx.data(None if norms is None else FrozenParam(norms**2))
        self.magnitude = nnx.data(None if norms is None else nnx.LoRAParam(norms))
        self.active = nnx.data(_active(base.stack, layers))
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.init: Init = init
        self.rslora = rslora

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return adapter_scale(self.rank, self.alpha, self.rslora)

    @property
    def factors(self) -> Factors:
        """What the adapter has of the linear."""
        return _factors(self.parts)

    def folded(self, weight: Any, parts: Parts, folding: Folding) -> Any:
        """Returns the merged kernel; see `Weighted.folded`."""
        return folding.linear(weight, _factors(parts), self.scale)

    def applied(self, weight: Any, parts: Parts) -> Applied:
        """Returns the kernel with its update; see `Weighted.applied`."""
        return Applied(weight, _factors(parts), jnp.float32(self.scale))

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
        """Applies base and adapter in the base's dtype; dropout only when a key is given."""
        x = self.base.incoming(x)
        a, b = self.lora_a[...], self.lora_b[...]
        if self.active is not None:
            b = b * self.active[...]
        y = self._product(x, a, b, key)
        if self.magnitude is not None:
            assert self.squared_norms is not None
            norms = adapted_norms(
                self.base, self.squared_norms[...], a, b, self.scale, x.dtype
            )
            gain = self.magnitude[...] / checkpoint_name(norms, "lora_norms")
            if self.active is not None:
                gain = 1 + self.active[...][0] * (gain - 1)
            y = checkpoint_name(y, "lora_unscaled").astype(jnp.float32)
            y = (y * gain).astype(x.dtype)
        return add_bias(y, self.base.bias)

    def _product(self, x: Array, a: Array, b: Array, key: Array | None) -> Array:
        if key is None or self.dropout == 0:
            return self.base.product(x, (a, b, self.scale))
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        hidden = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        update = low_rank(hidden.reshape(-1, x.shape[-1]), a, b, self.scale)
        return self.base.product(x) + update.reshape(*x.shape[:-1], -1)


def _factors(parts: Parts) -> Factors:
    """Returns an adapter's arrays of a linear as what folds them takes them."""
    active = parts.get("active")
    if active is not None:
        active = active[..., 0, 0]
    a, b, magnitude = (parts.get(name) for name in ("lora_a", "lora_b", "magnitude"))
    return Factors(a, b, magnitude, active)


def project(linear: Any, x: Array, key: Array | None, index: int) -> Array:
    """Applies a linear; where it is a LoRA, with a dropout key of its own.

    Args:
      linear: A Linear, QuantizedLinear, LoRA or what takes their place.
      x: (..., in).
      key: The layer's key for dropout; None switches it off.
      index: The number of the linear in its layer, which tells its key from others'.
    """
    if isinstance(linear, LoRA):
        return linear(x, key=None if key is None else jax.random.fold_in(key, index))
    return linear(x)


def adapter_scale(rank: int, alpha: float, rslora: bool) -> float:
    """Returns what an adapter's update is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _active(stack: tuple[int, ...], layers: tuple[int, ...]) -> FrozenParam | None:
    if not stack or not layers:
        return None
    mask = jnp.zeros(stack, jnp.float32).at[jnp.asarray(layers)].set(1)
    return FrozenParam(mask[..., None, None])
