"""`qlora evaluate`: perplexity of a text file, or loss and exact match of rows."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.cli import options
from qlora_jax.cli.options import QuantOptions
from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluate import exact_match, perplexity, row_loss
from qlora_jax.io.hf import check_output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluate a model, with or without an adapter."""

    model: str
    """Hugging Face folder or hub id."""

    data_file: Annotated[str, tyro.conf.arg(name="data")]
    """Rows (.jsonl): the loss of their answers. Anything else is text: its perplexity."""

    adapter: str | None = None
    """Run folder or adapter folder."""

    quant: QuantOptions = QuantOptions()
    """auto: a dense folder stays dense, or is held as the adapter's run held it."""

    dtype: str = "bfloat16"
    """Compute dtype: bfloat16, float16 or float32."""

    batch_size: int = 8
    """Rows or windows at once."""

    exact_match: bool = False
    """Rows: also answer each greedily and compare."""

    max_new_tokens: int = 64
    """Rows with exact match: where a wrong answer is cut off."""

    predictions: Path | None = None
    """Rows with exact match: write every answer there (.jsonl)."""

    window: int | None = None
    """Text: tokens of a window, BOS not counted; None for what the model was made for."""

    bos: bool = True
    """Text: put BOS in front of each window, where the tokenizer has one."""

    max_chars: int | None = None
    """Text: use its first characters only."""

    data: DataConfig = DataConfig()


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    path = Path(args.data_file)
    if not path.is_file():
        raise DataError(f"--data {path} is no file")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.predictions is not None:
        check_output(args.predictions, False)
        if not args.predictions.parent.is_dir():
            raise ConfigError(f"--predictions: {args.predictions.parent} is no folder")
    text = ""
    if path.suffix != ".jsonl":
        try:
            text = path.read_text(encoding="utf-8")[: args.max_chars]
        except UnicodeDecodeError:
            raise DataError(f"--data {path} is not UTF-8 text") from None
    model, tokenizer, said = options.open_model(
        args.model, args.adapter, args.quant, args.dtype
    )
    if tokenizer is None:
        raise DataError(f"{args.model} has no tokenizer.json, so text cannot be read")
    if path.suffix != ".jsonl":
        window = args.window
        if window is None:
            window = min(1024, model.config.max_position_embeddings - 1)
        bos = tokenizer.bos_id if args.bos else None
        value, count = perplexity(
            model,
            tokenizer.encode(text),
            window=window,
            bos_id=bos,
            batch_size=args.batch_size,
        )
        return {**said, "perplexity": value, "loss": math.log(value), "tokens": count}
    rows = read_dataset(path, tokenizer, args.data)
    loss, count = row_loss(model, rows, args.batch_size)
    figures = {**said, "loss": loss, "perplexity": math.exp(loss), "tokens": count}
    figures |= {"rows": len(rows), "rows_left_out": rows.dropped}
    if args.exact_match:
        share, answers = exact_match(
            model,
            rows,
            tokenizer,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        figures["exact_match"] = share
        if args.predictions is not None:
            lines = [json.dumps({**a._asdict(), "correct": a.correct}) for a in answers]
            args.predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return figures
