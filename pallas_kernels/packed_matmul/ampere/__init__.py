"""'ampere': fused products for Ampere and Ada (sm_80, 86, 89), mma.sync and cp.async.

  forward   y = x @ W.T (+ u @ v.T), computed as y.T: W is the first operand, decoded in
            registers, each weight by one warp only.
  backward  dx = dy @ W (+ u @ v.T), computed as dx.T, from the same bytes: a transposed
            load of a word tile has neighbours along n in a register.

Blocks of four warps, `blocks_per_sm` on each SM, walk over output tiles. A warp takes a
quarter of a tile's rows and all of its tokens. Copies run some turns ahead of the
products within a tile; while one block starts or stores a tile, the others multiply. The
low-rank pair (u, v) of a LoRA adapter is multiplied first, through the same buffers.

Proved by compilation alone: no Ampere or Ada card has run it yet, so it runs only where it
is asked for by name.
"""

from pallas_kernels.annotations import Array
from pallas_kernels.packed_matmul.ampere import config
from pallas_kernels.packed_matmul.implementation import Implementation
from pallas_kernels.packed_matmul.mosaic import tiled


def _forward(*operands, **options) -> Array:
    from pallas_kernels.packed_matmul.ampere.forward import forward

    return forward(*operands, **options)


def _backward(*operands, **options) -> Array:
    from pallas_kernels.packed_matmul.ampere.backward import backward

    return backward(*operands, **options)


IMPLEMENTATION = Implementation(
    forward=tiled(config.Config, _forward),
    backward=tiled(config.Config, _backward),
    refuses=config.refuses,
    configure=config.configure,
    suits=lambda problem, device: False,  # compiled, but not run on a card yet
    candidates=config.candidates,
)
