"""Packed weights: the formats that they are stored in, and products with them.

Needs jax and numpy alone. Knows no model and no adapter: everything above works on
`PackedWeight` (formats/) and `product_of` (matmul.py), or on the names below.
"""

from pallas_kernels.formats import QuantizedTensor as QuantizedTensor
from pallas_kernels.packed_matmul import choose as choose
from pallas_kernels.packed_matmul import nf4_lora_matmul as nf4_lora_matmul
from pallas_kernels.packed_matmul import nf4_matmul as nf4_matmul
