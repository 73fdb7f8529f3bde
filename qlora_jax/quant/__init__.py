"""4-bit tensors: quantize, dequantize, double quantization. jax and numpy alone."""

from pallas_kernels.layout import QuantizedTensor as QuantizedTensor
from qlora_jax.quant.config import QuantConfig as QuantConfig
from qlora_jax.quant.tensor import dequantize as dequantize
from qlora_jax.quant.tensor import quantize_tensor as quantize_tensor
