"""`qlora evaluate`: perplexity of a text file, or loss and exact match of rows.

With several adapters, of the base and each of them, or of the rows that name each.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.cli import options
from qlora_jax.data import DataConfig, Dataset, check_ids, read_dataset
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluate import exact_match, perplexity, row_loss, row_losses
from qlora_jax.evaluate.exact_match import Answer
from qlora_jax.generate import decoded
from qlora_jax.run import QuantOptions
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluate a model, with or without an adapter, or with several."""

    model: str
    """Hugging Face folder or hub id."""

    data_file: Annotated[str, tyro.conf.arg(name="data")]
    """Rows (.jsonl): the loss of their answers. Anything else is text: its perplexity."""

    adapter: str | None = None
    """Run folder, adapter folder or PEFT folder."""

    adapters: tuple[str, ...] = ()
    """Several, as NAME=FOLDER, of one base. Rows with an "adapter" field are each evaluated
    with theirs, in mixed batches; without one anywhere, everything with the base and each."""

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
    """Text: put BOS in front of each window, where the tokenizer puts one before a text."""

    max_chars: int | None = None
    """Text: use its first characters only."""

    data: DataConfig = DataConfig()


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    path = Path(args.data_file)
    _check(args, path)
    text = None
    if path.suffix != ".jsonl":
        try:
            text = path.read_text(encoding="utf-8")[: args.max_chars]
        except UnicodeDecodeError:
            raise DataError(f"--data {path} is not UTF-8 text") from None
    bank = None
    models: dict[str | None, Any] = {}
    each: dict[str | None, dict[str, Any]] = {}
    if args.adapters:
        bank, tokenizer, said = options.open_bank(
            args.model, args.adapters, args.quant, args.dtype
        )
        bank = decoded(bank)  # here, for all that follows
        models = {name: bank.route(name) for name in (BASE, *bank.adapters)}
    else:
        model, tokenizer, said = options.open_model(
            args.model, args.adapter, args.quant, args.dtype
        )
        models[None] = decoded(model)
    if tokenizer is None:
        raise DataError(f"{args.model} has no tokenizer.json, so text cannot be read")
    size = next(iter(models.values())).config.vocab_size
    if text is not None:
        tokens = tokenizer.encode(text)
        bos = tokenizer.before[0] if args.bos and tokenizer.before else None
        if tokens[:1] == [bos]:  # each window gets its own
            tokens = tokens[1:]
        if wrong := sorted({token for token in tokens if token >= size}):
            raise DataError(
                f"--data {path} has ids {wrong[:20]}; the model's embedding has {size} rows"
            )
        each = {n: _text_figures(args, m, tokens, bos) for n, m in models.items()}
    else:
        names = tuple(name for name in models if name is not None)
        rows = read_dataset(path, tokenizer, args.data, adapters=names)
        check_ids(rows.rows, tokenizer, size)
        said |= {"rows": len(rows), "rows_left_out": rows.dropped}
        if bank is not None and any(row.adapter is not None for row in rows.rows):
            each, answers = _mixed(args, bank, rows, tokenizer)
        else:
            answers: list[tuple[str | None, Answer]] = []
            for name, model in models.items():
                each[name], given = _row_figures(args, model, rows, tokenizer)
                answers += [(name, answer) for answer in given]
        if args.predictions is not None:
            _write(args.predictions, answers)
    return {**said, **(each[None] if bank is None else {"by_adapter": each})}


def _check(args: Args, path: Path) -> None:
    """Raises what can be said before anything is loaded."""
    if not path.is_file():
        raise DataError(f"--data {path} is no file")
    problems = []
    if args.batch_size < 1:
        problems.append(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.adapter is not None and args.adapters:
        problems.append("give either --adapter or --adapters")
    if args.predictions is not None and not args.exact_match:
        problems.append("--predictions goes with --exact-match")
    if problems:
        raise ConfigError("; ".join(problems))
    if args.predictions is not None:
        options.check_file("--predictions", args.predictions)


def _write(path: Path, answers: list[tuple[str | None, Answer]]) -> None:
    """Writes an answer a line, with the adapter that gave it where there are several."""
    with path.open("x", encoding="utf-8") as stream:
        for name, answer in answers:
            row = {} if name is None else {"adapter": name}
            row |= {**answer._asdict(), "correct": answer.correct}
            stream.write(json.dumps(row) + "\n")


def _mixed(
    args: Args, bank: AdapterBank, rows: Dataset, tokenizer: Tokenizer
) -> tuple[dict[str | None, dict[str, Any]], list[tuple[str | None, Answer]]]:
    """Returns each adapter's figures over the rows that name it, and the rows' answers."""
    each: dict[str | None, dict[str, Any]] = {
        name: _loss_figures(*pair)
        for name, pair in row_losses(bank, rows, args.batch_size).items()
    }
    if not args.exact_match:
        return each, []
    names = [row.adapter or BASE for row in rows.rows]
    answers = list(zip(names, _answers(args, bank, rows, tokenizer), strict=True))
    for name, figures in each.items():
        figures["exact_match"] = _share([a for theirs, a in answers if theirs == name])
    return each, [*answers]


def _text_figures(
    args: Args, model: Any, tokens: list[int], bos: int | None
) -> dict[str, Any]:
    window = args.window
    if window is None:
        window = min(1024, model.config.max_position_embeddings - 1)
    value, count = perplexity(
        model, tokens, window=window, bos_id=bos, batch_size=args.batch_size
    )
    return {"perplexity": value, "loss": math.log(value), "tokens": count}


def _row_figures(
    args: Args, model: Any, rows: Dataset, tokenizer: Tokenizer
) -> tuple[dict[str, Any], list[Answer]]:
    figures = _loss_figures(*row_loss(model, rows, args.batch_size))
    if not args.exact_match:
        return figures, []
    answers = _answers(args, model, rows, tokenizer)
    return {**figures, "exact_match": _share(answers)}, answers


def _loss_figures(loss: float, count: int) -> dict[str, Any]:
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": count}


def _answers(
    args: Args, model: Any, rows: Dataset, tokenizer: Tokenizer
) -> list[Answer]:
    return exact_match(
        model,
        rows,
        tokenizer,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )[1]


def _share(answers: list[Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)
