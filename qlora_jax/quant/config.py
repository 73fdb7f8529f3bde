"""QuantConfig: how weights are quantized; and how embedding and head may be held."""

import dataclasses
from typing import Literal

from pallas_kernels.codebook import CODEBOOKS, Codebook
from qlora_jax.errors import ConfigError

TableFormat = Literal["none", "4bit", "int8"]
"""Of embedding or head: 'none' leaves it dense; '4bit' is as QuantConfig has linears; 'int8'
has one absmax a row of the vocabulary."""

BLOCK_SIZES = tuple(2**i for i in range(5, 13))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a weight becomes 4 bits. The defaults are those of the QLoRA paper."""

    codebook: Codebook = "nf4"
    """The 16 values: nf4 (NormalFloat), fp4 (E2M1) or int4 (symmetric)."""

    block_size: int = 64
    """Elements that share one absmax; a power of two, 32 to 4096."""

    double_quant: bool = True
    """Keep absmax in 8 bits (4.127 bits a weight instead of 4.5)."""

    def __post_init__(self):
        if self.codebook not in CODEBOOKS:
            known = ", ".join(CODEBOOKS)
            raise ConfigError(
                f"--quant.codebook is {self.codebook!r}, expected {known}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"--quant.block-size is {self.block_size}, expected a power of two from "
                f"{BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
            )
