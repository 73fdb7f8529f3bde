"""FrozenParam, the variable of everything that does not train."""

from flax import nnx


class FrozenParam(nnx.Variable):
    """A base weight: never differentiated, optimized or checkpointed.

    Not an nnx.Param, so that a filter on nnx.Param cannot reach it (contract C4). Its
    value may be an array or a whole QuantizedTensor.
    """
