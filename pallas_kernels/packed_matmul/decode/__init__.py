"""'decode': the product for few tokens (generation), on sm_90 in one launch.

For few tokens all that counts is to read the weight once, on all SMs, with nothing else in
the way. It has no backward, and what is added is added behind it.
"""

import jax

from pallas_kernels.annotations import Array
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul.decode import config
from pallas_kernels.packed_matmul.implementation import Addend, Implementation, added
from pallas_kernels.tuning import Choice


def _forward(
    x: Array, w: QuantizedTensor, addend: Addend, choice: Choice, device: Device
) -> Array:
    from pallas_kernels.packed_matmul.decode.forward import forward

    fields = config.Config(**dict(choice.config))

    # A batch of weights goes one by one: the kernel's grid has no axis for it.
    @jax.custom_batching.sequential_vmap
    def product(x, w):
        return forward(x, w, config=fields, num_sms=device.cores)

    return added(product(x, w), addend)


IMPLEMENTATION = Implementation(
    forward=_forward,
    backward=None,
    refuses=config.refuses,
    configure=config.configure,
    suits=config.suits,
    candidates=config.candidates,
)
