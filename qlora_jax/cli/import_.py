"""`qlora import`: a PEFT adapter becomes one of ours."""

import dataclasses
from pathlib import Path
from typing import Any

from qlora_jax.adapters.attach import split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.cli import options
from qlora_jax.config.quant import QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.find import load_tokenizer
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.peft import is_peft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Turn a PEFT adapter folder into an adapter folder."""

    adapter: str
    """The PEFT folder."""

    model: str
    """Its base: Hugging Face folder or hub id."""

    out: Path
    """Folder to write."""

    quant: QuantOptions = QuantOptions()
    """These say how the base is held meanwhile; an adapter fits it dense and 4-bit alike."""

    overwrite: bool = False
    """Replace an adapter that is there."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    if not is_peft(args.adapter):
        raise ConfigError(f"{args.adapter} is no PEFT folder: no adapter_config.json")
    model, _, said = options.open_model(
        args.model, args.adapter, args.quant, "bfloat16"
    )
    config = lora_config(model)
    out = save_adapter(
        args.out,
        split(model)[1],
        config,
        tokenizer=load_tokenizer(args.adapter),
        overwrite=args.overwrite,
    )
    return {**said, "out": str(out), "rank": config.rank, "alpha": config.alpha}
