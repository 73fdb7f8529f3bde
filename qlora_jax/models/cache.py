"""What decoding remembers, and what all layers of one pass share."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Int


class Cache(nnx.Pytree):
    """What the layers remember of the tokens seen so far.

    Attributes:
      layers: For each slot of the model's segments what its mixer remembers, every array
        with a leading axis of the slot's layers.
      positions: int32 (batch, capacity); -1 where nothing is stored or the token was
        padding.
      length: int32 (), slots filled.
    """

    def __init__(self, layers: list[Any], positions: Array, length: Array):
        self.layers = nnx.data(layers)
        self.positions, self.length = nnx.data(positions), nnx.data(length)


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one pass over some tokens share.

    Attributes:
      positions: The position of each token, int32 (batch, seq); -1 for padding.
      shared: What the mixers' `shared` made of them.
      seen_positions: While decoding, int32 (batch, capacity): those of the cache, these
        tokens' among them.
      length: While decoding, int32 (): tokens in the cache before these.
      given: What earlier layers remember, by the names that they give it.
    """

    positions: Int[Array, "batch seq"]
    shared: dict[Any, Any]
    seen_positions: Int[Array, "batch capacity"] | None = None
    length: Int[Array, ""] | None = None
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
