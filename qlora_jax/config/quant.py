"""QuantConfig, how a weight becomes 4 bits, and QuantOptions, how a run holds its base."""

import dataclasses
from typing import Literal

from pallas_kernels.formats.absmax4.codebook import BLOCK_SIZES, CODEBOOKS, Codebook
from qlora_jax.errors import ConfigError

TableFormat = Literal["none", "4bit", "int8"]
"""An embedding or a head is held so: 'none' leaves it dense; '4bit' stores it as QuantConfig
says of linears; 'int8' stores one byte a value and one absmax a row."""


Mxfp4Use = Literal["keep", "decode"]
"""Linears that a folder has in MXFP4, or a GGUF file of all its experts, are held as they are
('keep'), or decoded as they are read, and then held as QuantConfig says of dense ones
('decode')."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Says how a weight becomes 4 bits. The defaults are those of the QLoRA paper."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """These settings say in how many bits a run holds the frozen weights of its base."""

    codebook: Literal["auto", "nf4", "fp4", "int4", "none"] = "auto"
    """nf4, fp4 or int4 quantize a dense folder while it loads; none keeps it dense; auto
    takes a 4-bit folder as it is, a dense one as the subcommand says."""

    block_size: int = 64
    """Elements that share one absmax; a power of two, 32 to 4096."""

    double_quant: bool = True
    """Whether absmax is kept in 8 bits (4.127 bits a weight), or in float32 (4.5)."""

    embedding: TableFormat = "none"
    """This is how the embedding is held, and a tied head with it: 4bit as the linears are,
    int8 with one scale a row; none leaves it as the folder has it, dense unless that is
    int8. Change it where the vocabulary takes much of the memory: int8 halves its bytes."""

    head: TableFormat = "none"
    """This is how a head that is not tied to the embedding is held, in the same terms."""

    mxfp4: Mxfp4Use = "keep"
    """This is how the experts of a folder or GGUF file that has them in MXFP4 (gpt-oss) are
    held: keep trains on the very weights that are served, decode makes of them what codebook
    says of dense ones, which fused GPU kernels read faster."""

    def config(self) -> QuantConfig:
        """Returns the QuantConfig, of NF4 for 'auto'."""
        codebook = "nf4" if self.codebook in ("auto", "none") else self.codebook
        return QuantConfig(
            codebook=codebook,
            block_size=self.block_size,
            double_quant=self.double_quant,
        )
