"""The table of token vectors: frozen, dense or quantized; with an update, or some rows trained.

A tied head is made of the table by `head`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn.linear import DecodedLinear, Linear, QuantizedLinear
from qlora_jax.nn.lora import adapter_scale
from qlora_jax.nn.matmul import factor_matmul
from qlora_jax.nn.variables import FrozenParam, trains


class Embedding(nnx.Module):
    """A table of token vectors.

    Attributes:
      weight: FrozenParam, (vocab, hidden).
    """

    def __init__(self, weight: Array):
        self.weight = FrozenParam(weight)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Returns the tokens' rows, in the table's dtype."""
        return self.weight[...][tokens]

    def head(self) -> Linear:
        """Returns the head that a tied table is."""
        linear = Linear(self.weight[...])
        if trains(self.weight):
            linear.kernel = nnx.LoRAParam(self.weight[...])
        return linear


class QuantizedEmbedding(nnx.Module):
    """A quantized table of token vectors; rows are decoded as they are read.

    Attributes:
      weight: FrozenParam holding a PackedWeight, (vocab, hidden).
    """

    def __init__(self, weight: PackedWeight):
        self.weight = FrozenParam(weight)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Returns the tokens' rows, float32."""
        table = self.weight.get_value()
        rows = table.decode_rows(tokens.reshape(-1), "float32")
        return rows.reshape(*tokens.shape, -1)

    def head(self) -> QuantizedLinear | DecodedLinear:
        """Returns the head that the tied table is."""
        return QuantizedLinear(self.weight.get_value())


class DecodedEmbedding(QuantizedEmbedding):
    """A tied 4-bit table whose head is decoded once, for inference.

    Rows are decoded as they are read all the same: they are few.

    Attributes:
      weight: FrozenParam holding a PackedWeight, (vocab, hidden).
      decoded: FrozenParam, the same in the compute dtype.
    """

    def __init__(self, weight: PackedWeight, dtype: str):
        super().__init__(weight)
        self.decoded = FrozenParam(weight.decode(dtype))

    def head(self) -> DecodedLinear:
        """Returns the head that the tied table is."""
        return DecodedLinear(self.decoded[...])


Table = Embedding | QuantizedEmbedding


class LoRAEmbedding(nnx.Module):
    """A frozen table with an adapter: base(tokens) + scale * lora_a[tokens] @ lora_b.

    A tied head stays as it was. Initialised as PEFT does (peft/tuners/lora/layer.py).

    Attributes:
      base: The table.
      lora_a: nnx.LoRAParam, float32 (vocab, rank), zero.
      lora_b: nnx.LoRAParam, float32 (rank, hidden), standard normal.
    """

    def __init__(
        self, base: Table, *, rank: int, alpha: float, rslora: bool, key: Array
    ):
        vocab, hidden = base.weight.get_value().shape
        self.base = base
        self.lora_a = nnx.LoRAParam(jnp.zeros((vocab, rank), jnp.float32))
        self.lora_b = nnx.LoRAParam(jax.random.normal(key, (rank, hidden)))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return adapter_scale(self.rank, self.alpha, self.rslora)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Returns the tokens' adapted rows, in the table's dtype."""
        rows = self.base(tokens)
        update = self.lora_a[...][tokens] @ self.lora_b[...]
        return (rows.astype(jnp.float32) + self.scale * update).astype(rows.dtype)

    def head(self) -> Linear | QuantizedLinear | DecodedLinear:
        """Returns the head that the tied table is, without the update."""
        return self.base.head()


class TrainedRows(nnx.Module):
    """An embedding or a head, some tokens' rows of which train.

    Attributes:
      base: The table, or the head's linear.
      rows: nnx.LoRAParam, float32 (tokens, hidden): in place of the base's.
      tokens: Their ids, in the order of rows.
    """

    def __init__(self, base: Any, rows: nnx.LoRAParam, tokens: tuple[int, ...]):
        self.base = base
        self.rows = rows
        self.tokens = tokens

    @property
    def out_features(self) -> int:
        """Size of the vocabulary, of a head."""
        return self.base.out_features

    def __call__(self, x: Array) -> Array:
        """Returns the rows of tokens, or the logits of hidden states."""
        return self._rows_of(x) if isinstance(self.base, Table) else self._logits(x)

    def _rows_of(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        order = np.argsort(self.tokens).astype(np.int32)
        known = jnp.asarray(np.asarray(self.tokens, np.int32)[order])
        place = jnp.minimum(jnp.searchsorted(known, tokens), len(order) - 1)
        theirs = self.base(tokens)
        mine = self.rows[...][jnp.asarray(order)[place]].astype(theirs.dtype)
        return jnp.where((known[place] == tokens)[..., None], mine, theirs)

    def _logits(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        # In float32: XLA's CPU has no bf16 product of what the update's gradient gathers.
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        mine = factor_matmul(flat, self.rows[...].T).reshape(*x.shape[:-1], -1)
        logits = self.base(x)
        return logits.at[..., jnp.asarray(self.tokens)].set(mine.astype(logits.dtype))

    def head(self) -> "TrainedRows":
        """Returns the head that the tied table is, with the same rows."""
        return TrainedRows(self.base.head(), self.rows, self.tokens)
