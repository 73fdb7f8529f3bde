"""The product with a packed 4-bit weight: one op, an implementation a file or a folder.

api.py         nf4_matmul and nf4_lora_matmul: checks and differentiation
choice.py      which implementation runs, and why
xla.py         the definition, in plain jax.numpy
two_pass.py    decodes the weight, then the library's product
hopper/ ampere/ decode/
               fused kernels of a GPU generation, or for few tokens: each with its
               refusals, its heuristics (config.py) and its kernels
"""

from pallas_kernels.packed_matmul.api import nf4_lora_matmul as nf4_lora_matmul
from pallas_kernels.packed_matmul.api import nf4_matmul as nf4_matmul
from pallas_kernels.packed_matmul.choice import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.packed_matmul.choice import choose as choose
