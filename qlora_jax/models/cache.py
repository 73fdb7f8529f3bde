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
      documents: Where rows hold several documents, how many tokens of its own are before
        each token, int32 (batch, seq); None where each row is one.
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
    documents: Int[Array, "batch seq"] | None = None

    @property
    def places(self) -> Int[Array, "batch seq"]:
        """The place of each token in its own document, int32 (batch, seq); 0 is the first."""
        return self.positions if self.documents is None else self.documents
