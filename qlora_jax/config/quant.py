"""QuantOptions: how a run holds its base."""

import dataclasses
from typing import Literal

from qlora_jax.quant import QuantConfig, TableFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """How the base's weights are held."""

    codebook: Literal["auto", "nf4", "fp4", "int4", "none"] = "auto"
    """nf4, fp4 or int4 quantize a dense folder while it loads; none keeps it dense; auto
    takes a 4-bit folder as it is, a dense one as the subcommand says."""

    block_size: int = 64
    """Elements that share one absmax; a power of two, 32 to 4096."""

    double_quant: bool = True
    """Keep absmax in 8 bits."""

    embedding: TableFormat = "none"
    """Of the embedding, and a tied head with it: 4bit is as the linears are held, int8 has
    one scale a row; none leaves it as the folder has it, dense unless that is int8."""

    head: TableFormat = "none"
    """The same of an untied head."""

    def config(self) -> QuantConfig:
        """Returns the QuantConfig, of NF4 for 'auto'."""
        codebook = "nf4" if self.codebook in ("auto", "none") else self.codebook
        return QuantConfig(
            codebook=codebook,
            block_size=self.block_size,
            double_quant=self.double_quant,
        )
