"""The table of token vectors: frozen, dense or quantized; with an update, or some rows trained.

A tied head is made of the table by `head`.
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn.folding import Applied, Factors, Folding, with_rows
from qlora_jax.nn.frozen import Adapted, Parts, Weighted
from qlora_jax.nn.linear import DecodedLinear, FrozenLinear, Linear, QuantizedLinear
from qlora_jax.nn.lora import adapter_scale
from qlora_jax.nn.matmul import factor_matmul
from qlora_jax.nn.variables import FrozenParam, trains


class FrozenTable(Weighted):
    """What a dense table of token vectors and a quantized one share.

    Attributes:
      weight: FrozenParam, (vocab, hidden), dense or packed.
    """

    AXES: ClassVar = {"weight": ("vocab", "hidden"), "dense": ("vocab", "hidden")}
    weight: nnx.Variable

    def holding(self, weight: Any, bias: Any = None) -> "FrozenTable":
        """Returns the table of other rows in its place."""
        packed = isinstance(weight, PackedWeight)
        return QuantizedEmbedding(weight) if packed else Embedding(weight)

    @abc.abstractmethod
    def head(self) -> FrozenLinear:
        """Returns the head that a tied table is."""

    @abc.abstractmethod
    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Returns the tokens' rows."""


class Embedding(FrozenTable):
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


class QuantizedEmbedding(FrozenTable):
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

    def head(self) -> FrozenLinear:
        """Returns the head that the tied table is."""
        return QuantizedLinear(self.weight.get_value())

    def decodes_for_products(self, tied: bool) -> bool:
        """Whether it has products: those of a tied head."""
        return tied

    def decoded(self, dtype: str) -> "DecodedEmbedding":
        """Returns the table with its head decoded once."""
        return DecodedEmbedding(self.weight.get_value(), dtype)


class DecodedEmbedding(QuantizedEmbedding):
    """A tied 4-bit table whose head is decoded once, for inference.

    Rows are decoded as they are read all the same: they are few.

    Attributes:
      weight: FrozenParam holding a PackedWeight, (vocab, hidden).
      dense: FrozenParam, the same in the compute dtype.
    """

    def __init__(self, weight: PackedWeight, dtype: str):
        super().__init__(weight)
        self.dense = FrozenParam(weight.decode(dtype))

    def decodes_for_products(self, tied: bool) -> bool:
        """Its head is decoded already."""
        return False

    def head(self) -> DecodedLinear:
        """Returns the head that the tied table is."""
        return DecodedLinear(self.dense[...])


class LoRAEmbedding(Adapted):
    """A frozen table with an adapter: base(tokens) + scale * lora_a[tokens] @ lora_b.

    A tied head stays as it was. Initialised as PEFT does (peft/tuners/lora/layer.py).

    Attributes:
      base: The table.
      lora_a: nnx.LoRAParam, float32 (vocab, rank), zero.
      lora_b: nnx.LoRAParam, float32 (rank, hidden), standard normal.
    """

    PARTS = ("lora_a", "lora_b")
    AXES: ClassVar = {"lora_a": ("vocab", "rank"), "lora_b": ("rank", "hidden")}

    def __init__(
        self, base: FrozenTable, *, rank: int, alpha: float, rslora: bool, key: Array
    ):
        vocab, hidden = base.shape
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

    def head(self) -> FrozenLinear:
        """Returns the head that the tied table is, without the update."""
        return self.base.head()

    def folded(
        self, weight: Any, parts: Parts, folding: Folding
    ) -> Float[Array, "vocab hidden"]:
        """Returns the merged table, which is dense; see `Weighted.folded`."""
        return folding.table(weight, parts["lora_a"], parts["lora_b"], self.scale)

    def applied(self, weight: Any, parts: Parts) -> Applied:
        """Returns the table with its update: its rows are the outputs of a linear."""
        factors = Factors(parts["lora_b"].T, parts["lora_a"].T)
        return Applied(weight, factors, jnp.float32(self.scale))


class TrainedRows(Adapted):
    """An embedding or a head, some tokens' rows of which train.

    Attributes:
      base: The table, or the head's linear.
      rows: nnx.LoRAParam, float32 (tokens, hidden): in place of the base's.
      tokens: Their ids, in the order of rows.
    """

    PARTS = ("rows",)

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
        return (
            self._rows_of(x) if isinstance(self.base, FrozenTable) else self._logits(x)
        )

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

    def folded(
        self, weight: Any, parts: Parts, folding: Folding
    ) -> Float[Array, "vocab hidden"]:
        """Returns the table or head with these rows; see `Weighted.folded`."""
        return with_rows(weight, parts["rows"], self.tokens)

    def applied(self, weight: Any, parts: Parts) -> None:
        """Returns None: rows take the place of the base's."""
