"""absmax4: 4-bit codes of a codebook (nf4, fp4, int4) with one absmax a block.

codebook.py has the tables, layout.py how codes lie in memory, decode.py and encode.py what
they mean, storage.py bitsandbytes' keys; weight.py is the format.
"""

from pallas_kernels.formats.absmax4.weight import QuantizedTensor as QuantizedTensor
