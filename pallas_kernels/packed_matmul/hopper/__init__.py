"""'hopper': fused products for sm_90, wgmma with the weight decoded in registers.

  forward   y = x @ W.T (+ u @ v.T), computed as y.T: W is the operand that wgmma takes
            from registers, x comes from shared memory by TMA.
  backward  dx = dy @ W (+ u @ v.T), computed as dx.T, from the same bytes: a transposed
            load of a word tile has neighbours along n in a register.

Both are persistent: as many blocks as SMs, each walking over output tiles. One
warpgroup only issues TMA copies and runs ahead over tile borders; two compute. Of a
compute warpgroup's products one is always in flight while the next plane is decoded,
and the two warpgroups keep each other's tensor core busy. The low-rank pair (u, v) of a
LoRA adapter enters as more steps of the same loop: v goes through the weight's buffers
and straight to wgmma, so an adapted linear makes one trip of y through memory.
"""

from pallas_kernels.annotations import Array
from pallas_kernels.packed_matmul.hopper import config
from pallas_kernels.packed_matmul.implementation import Implementation
from pallas_kernels.packed_matmul.mosaic import tiled


def _forward(*operands, **options) -> Array:
    from pallas_kernels.packed_matmul.hopper.forward import forward

    return forward(*operands, **options)


def _backward(*operands, **options) -> Array:
    from pallas_kernels.packed_matmul.hopper.backward import backward

    return backward(*operands, **options)


IMPLEMENTATION = Implementation(
    forward=tiled(config.Config, _forward),
    backward=tiled(config.Config, _backward),
    refuses=config.refuses,
    configure=config.configure,
    candidates=config.candidates,
)
