"""Kernels for 4-bit weights: storage layouts, the reference ops and `nf4_matmul`.

Needs jax and numpy alone. Knows no model and no adapter: everything above works on
`QuantizedTensor` through the names below.
"""

from pallas_kernels.layout import QuantizedTensor as QuantizedTensor
from pallas_kernels.packed_matmul import choose as choose
from pallas_kernels.packed_matmul import nf4_lora_matmul as nf4_lora_matmul
from pallas_kernels.packed_matmul import nf4_matmul as nf4_matmul
