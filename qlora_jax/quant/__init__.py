"""Quantized tensors, 4-bit and int8 by rows: there and back. jax and numpy alone."""

from pallas_kernels.layout import QuantizedTensor as QuantizedTensor
from qlora_jax.quant.config import QuantConfig as QuantConfig
from qlora_jax.quant.config import TableFormat as TableFormat
from qlora_jax.quant.int8 import Int8Rows as Int8Rows
from qlora_jax.quant.int8 import quantize_rows as quantize_rows
from qlora_jax.quant.tensor import Quantized as Quantized
from qlora_jax.quant.tensor import dequantize as dequantize
from qlora_jax.quant.tensor import dequantize_rows as dequantize_rows
from qlora_jax.quant.tensor import quantize_tensor as quantize_tensor
