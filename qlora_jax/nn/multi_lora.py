"""Several adapters beside one frozen linear; each row of a batch takes its own.

    y = gain[slot] * (base(x) + scale[slot] * (x @ a[slot]) @ b[slot]) + bias[slot]

The base's product is one for the whole batch, as without adapters. The factors of each
row's adapter are gathered and multiplied by row; adapters of lower rank are filled with
zeros. Which adapter a row takes is an array, so another choice compiles nothing anew.

Source of the idea: Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.errors import ShapeError
from qlora_jax.nn.linear import FrozenLinear
from qlora_jax.nn.variables import FrozenParam

_FEW = 8
"""Tokens a row below which copying factors by row costs more than multiplying by all."""


class Slots(nnx.Variable):
    """Which adapter each row takes: int32 (..., rows), or one for all rows (..., 1)."""


class MultiLoRA(nnx.Module):
    """A frozen linear with room for several adapters.

    Attributes:
      base: The linear, dense or quantized.
      lora_a: FrozenParam, (..., slots, in, rank), in the compute dtype.
      lora_b: FrozenParam, (..., slots, rank, out), in the compute dtype.
      scale: FrozenParam, float32 (..., slots), zero where no adapter is.
      gain: FrozenParam, float32 (..., slots, out), what DoRA multiplies outputs by; None
        where no adapter does.
      bias: FrozenParam, float32 (..., slots, out), in place of the base's; None where no
        adapter trained one.
      slots: The slot of the adapter that each row takes; the number of slots means none.
    """

    def __init__(
        self,
        base: FrozenLinear,
        *,
        slots: int,
        rank: int,
        gain: bool,
        bias: bool,
        dtype: str,
    ):
        stack, out = base.stack, base.out_features
        self.base = base
        self.count = slots
        self.rank = rank
        self.lora_a = FrozenParam(
            jnp.zeros((*stack, slots, base.in_features, rank), dtype)
        )
        self.lora_b = FrozenParam(jnp.zeros((*stack, slots, rank, out), dtype))
        self.scale = FrozenParam(jnp.zeros((*stack, slots), jnp.float32))
        ones = jnp.ones((*stack, slots, out), jnp.float32)
        self.gain = nnx.data(FrozenParam(ones) if gain else None)
        self.bias = nnx.data(None)
        if bias:
            own = 0.0 if base.bias is None else base.bias[...].astype(jnp.float32)
            # The base's own, for adapters that have none.
            self.bias = nnx.data(
                FrozenParam(jnp.zeros_like(ones) + jnp.expand_dims(own, -2))
            )
        self.slots = Slots(jnp.full((*stack, 1), slots, jnp.int32))

    @property
    def in_features(self) -> int:
        """Size of the last axis of an input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the last axis of an output."""
        return self.base.out_features

    def __call__(
        self, x: Float[Array, "rows *seq in"]
    ) -> Float[Array, "rows *seq out"]:
        """Applies base and adapters in x's dtype.

        Raises:
          ShapeError: x has another number of rows than adapters were chosen for.
        """
        slots = self.slots[...]
        if len(slots) not in (1, x.shape[0]):
            raise ShapeError(
                f"adapters were chosen for {len(slots)} rows, the batch has {x.shape[0]}"
            )
        x = self.base.incoming(x)
        y = self.base.product(x)
        rows = x.reshape(len(slots), -1, x.shape[-1])
        y = y + self._update(rows, slots).astype(x.dtype).reshape(y.shape)
        spread = (len(slots), *(1,) * (y.ndim - 2), -1)
        if self.gain is not None:
            gain = _of(self.gain[...], slots, 1).reshape(spread)
            y = (y.astype(jnp.float32) * gain).astype(x.dtype)
        own = None if self.base.bias is None else self.base.bias[...]
        if self.bias is not None:
            theirs = _of(self.bias[...], slots, 0)
            chosen = (slots < self.count)[:, None]
            bias = jnp.where(chosen, theirs, 0.0 if own is None else own)
            return (y.astype(jnp.float32) + bias.reshape(spread)).astype(x.dtype)
        return y if own is None else y + own.astype(y.dtype)

    def _update(
        self, x: Float[Array, "rows tokens in"], slots: Int[Array, " rows"]
    ) -> Float[Array, "rows tokens out"]:
        """Returns scale * (x @ a) @ b of each row's adapter, float32."""
        rows, tokens, _ = x.shape
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if rows > self.count and tokens < _FEW:
            # All adapters for all rows, all but a row's own as zeros.
            own = jax.nn.one_hot(slots, self.count) * self.scale[...]
            hidden = dot("rti,sik->rtsk", x, a) * own[:, None, :, None]
            return dot("rtsk,sko->rto", hidden.astype(x.dtype), b)
        a, b, scale = (_of(each, slots, 0) for each in (a, b, self.scale[...]))
        hidden = dot("rti,rik->rtk", x, a) * scale[:, None, None]
        return dot("rtk,rko->rto", hidden.astype(x.dtype), b)


def _of(bank: Array, slots: Array, nothing: float) -> Array:
    """Returns each row's part of a bank; `nothing` where a row takes no adapter."""
    return jnp.take(bank, slots, axis=0, mode="fill", fill_value=nothing)
