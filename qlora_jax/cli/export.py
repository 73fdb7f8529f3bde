"""`qlora export`: an adapter for PEFT, or a model for llama.cpp."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from qlora_jax.cli import options
from qlora_jax.config.quant import QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.find import load_tokenizer
from qlora_jax.exchange.peft import export_peft
from qlora_jax.sources.gguf.write import write_gguf
from qlora_jax.sources.source import open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write what other tools open: a PEFT adapter, or a GGUF model."""

    model: str
    """The adapter's base; for gguf the dense folder to write."""

    out: Path
    """Folder (peft) or file (gguf) to write."""

    format: Literal["peft", "gguf"] = "peft"
    """peft: the adapter of --adapter; gguf: the model (merge an adapter first)."""

    adapter: str | None = None
    """Run folder or adapter folder, for peft."""

    base_name: str | None = None
    """What the PEFT folder calls its base, a hub id say; --model as it is given unless set."""

    dtype: Literal["f16", "q8_0", "bf16", "f32"] = "f16"
    """A GGUF file's matrices are written in this format; q8_0 takes about half of f16's
    bytes."""

    quant: QuantOptions = QuantOptions()
    """These say how the base is held while its adapter is read; auto does as its run did."""

    overwrite: bool = False
    """Replace what is there."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    if args.format == "gguf":
        if args.base_name is not None:
            raise ConfigError(
                "--base-name is of a PEFT folder; a GGUF file has no base"
            )
        if args.adapter is not None:
            raise ConfigError(
                "a GGUF file holds one model: fold the adapter in with qlora merge, then "
                "export the merged folder without --adapter"
            )
        return write_gguf(args.model, args.out, args.dtype, overwrite=args.overwrite)
    if args.adapter is None:
        raise ConfigError("--adapter is missing: whose PEFT folder is to be written?")
    model, _, said = options.open_model(
        args.model, args.adapter, args.quant, "bfloat16"
    )
    base = args.base_name or _as_given(args.model, args.adapter, said)
    source = open_source(said.get("base_folder", args.model))
    tokenizer = load_tokenizer(args.adapter)
    if tokenizer is None:
        tokenizer = source.tokenizer if source.is_gguf else source.path
    out = export_peft(
        args.out, model, base=base, tokenizer=tokenizer, overwrite=args.overwrite
    )
    return {**said, "out": str(out), "format": "peft", "base_name": base}


def _as_given(model: str, adapter: str, said: dict[str, Any]) -> str:
    """Returns the base's name: --model, or the run's own base where --adapter says."""
    own = said.get("base_folder")
    if own is None:
        return model
    given = Path(adapter).expanduser().is_absolute()
    return own if given else os.path.relpath(own)
