"""The jaxtyping names the signatures use, absent on a host with jax and numpy alone.

A GPU host that only runs the kernels has no jaxtyping; annotations then mean nothing
and cost nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Shaped, UInt8, UInt16
else:
    try:
        from jaxtyping import Array, Float, Int, Shaped, UInt8, UInt16
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item):
                return item[0] if isinstance(item, tuple) else item

        from jax import Array

        Float = Int = Shaped = UInt8 = UInt16 = _Unchecked

__all__ = ["Array", "Float", "Int", "Shaped", "UInt8", "UInt16"]
