"""`qlora evaluate`: perplexity of a text, loss and exact match of rows, or choices.

With several adapters, of the base and each of them, or of the rows that name each.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.cli import options
from qlora_jax.config.quant import QuantOptions
from qlora_jax.data import DataConfig, Dataset, check_ids, read_dataset
from qlora_jax.data.questions import ChoicesAs, Question, read_questions
from qlora_jax.data.records import kind_of
from qlora_jax.data.unpacking import open_bytes
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluate import (
    answer_figures,
    ask,
    choice_figures,
    exact_match,
    extractor,
    row_losses,
    score_choices,
    window_losses,
)
from qlora_jax.evaluate.choices import Asked
from qlora_jax.files import write_file
from qlora_jax.inference import decoded
from qlora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Kind = Literal["prose", "rows", "choices"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluate a model, with or without an adapter, or with several."""

    model: str
    """Hugging Face folder or hub id."""

    data_file: Annotated[str, tyro.conf.arg(name="data")]
    """Rows, in any kind of file that `qlora train` reads: the loss of their answers. Anything
    else is text: its perplexity."""

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
    """Rows, windows or questions at once."""

    exact_match: bool = False
    """Rows: also answer each greedily and compare."""

    max_new_tokens: int = 64
    """Rows with exact match: where a wrong answer is cut off."""

    stop: tuple[str, ...] = ()
    """Rows with exact match: texts that end an answer; they and what follows them are left
    out."""

    answer_pattern: str | None = None
    """Rows with exact match: compare what this takes out of expected and given answers,
    numbers as numbers. gsm8k takes the rest of the line after the first ####, boxed what the
    last \\boxed{...} holds; anything else is a regular expression, of whose last match the
    first group counts, or all of it."""

    choices: bool = False
    """Rows are questions with choices: score each choice by its likelihood. Rows have
    "question", "choices" and "answer" (an index from 0, a letter or a choice's text), or an
    "input" that ends in lettered choices and an "output" that is a letter; and may have a
    "subject"."""

    choices_as: ChoicesAs = "letters"
    """The way in which --choices asks: letters lists the choices in the prompt and scores A, B,
    ... (as MMLU does); texts lists none and scores the choices' own texts (as ARC does)."""

    shots: int = 0
    """With --choices so many answered examples, of the question's subject, go before each
    question. MMLU is usually given five."""

    shots_data: Path | None = None
    """The rows that the examples of --shots are taken from; None takes the other rows of the
    same file."""

    predictions: Path | None = None
    """Every answer of --exact-match or --choices is written to this file (.jsonl)."""

    window: int | None = None
    """Text: tokens of a window, BOS not counted; None for what the model was made for."""

    bos: bool = True
    """Text: put BOS in front of each window, where the tokenizer puts one before a text."""

    max_chars: int | None = None
    """Text: use its first characters only."""

    data: DataConfig = DataConfig()


class Result(NamedTuple):
    """What a model, or a bank, gave for rows or questions.

    Attributes:
      figures: Takes the indices of some rows or questions, and returns the figures over
        them.
      lines: What --predictions says of each row.
    """

    figures: Callable[[Sequence[int]], dict[str, Any]]
    lines: list[dict[str, Any]]


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    path = Path(args.data_file)
    if not path.is_file():
        raise DataError(f"--data {path} is no file")
    kind: Kind = "prose"
    if kind_of(path) != "prose":
        kind = "choices" if args.choices else "rows"
    _check(args, path, kind)
    text = _read_text(args, path) if kind == "prose" else ""
    extract = None if args.answer_pattern is None else extractor(args.answer_pattern)
    logger.info("%s is read as %s", path, kind)
    models, bank, tokenizer, said = _open(args)
    said |= {"data": str(path), "read_as": kind}
    size = next(iter(models.values())).config.vocab_size
    names = tuple(name for name in models if name is not None)
    if kind == "prose":
        tokens, bos = _text_tokens(args, path, tokenizer, text, size)
        each = {n: _text_figures(args, m, tokens, bos) for n, m in models.items()}
        return {**said, **(each[None] if bank is None else {"by_adapter": each})}
    if kind == "choices":
        questions = read_questions(path, args.data, adapters=names)
        asked = _ask(args, questions, tokenizer, size)
        said |= {"rows": len(asked.questions), "rows_left_out": asked.dropped}
        chosen = [question.adapter for question in asked.questions]
        score = functools.partial(_of_choices, args, asked)
    else:
        rows = _read_rows(args, path, tokenizer, names, size)
        said |= {"rows": len(rows), "rows_left_out": rows.dropped}
        chosen = [row.adapter for row in rows.rows]
        score = functools.partial(_of_rows, args, rows, tokenizer, extract)
    each, lines = _by_adapter(models, bank, chosen, score)
    if args.predictions is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(args.predictions, text)
    return {**said, **(each[None] if bank is None else {"by_adapter": each})}


def _check(args: Args, path: Path, kind: Kind) -> None:
    """Raises what can be said before anything is loaded."""
    problems = []
    if args.batch_size < 1:
        problems.append(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.adapter is not None and args.adapters:
        problems.append("give either --adapter or --adapters")
    if args.exact_match and args.choices:
        problems.append("give either --exact-match or --choices")
    if "" in args.stop:
        problems.append("--stop has an empty text")
    needed = {
        "--predictions": (args.predictions, "--exact-match or --choices"),
        "--stop": (args.stop, "--exact-match"),
        "--answer-pattern": (args.answer_pattern, "--exact-match"),
        "--choices-as": (args.choices_as != "letters", "--choices"),
        "--shots": (args.shots, "--choices"),
        "--shots-data": (args.shots_data, "--choices"),
    }
    for flag, (given, needs) in needed.items():
        have = {"--exact-match": args.exact_match, "--choices": args.choices}
        if given and not any(have[one] for one in needs.split(" or ")):
            problems.append(f"{flag} goes with {needs}")
    if args.shots_data is not None and not args.shots:
        problems.append("--shots-data goes with --shots")
    if args.data.eval_rows:
        problems.append("--data.eval-rows goes with train")
    if args.data.packing != "auto":
        problems.append("--data.packing goes with train")
    if args.data.too_long == "split" and (args.exact_match or args.choices):
        problems.append("--data.too-long split leaves no whole answer to ask for")
    of_rows = {
        "--exact-match": args.exact_match,
        "--choices": args.choices,
        "--data.*": args.data != DataConfig(),
    }
    of_text = {
        "--window": args.window is not None,
        "--max-chars": args.max_chars is not None,
        "--no-bos": not args.bos,
    }
    wrong = of_rows if kind == "prose" else of_text
    if given := [flag for flag, is_given in wrong.items() if is_given]:
        has = {
            "prose": "prose (it does not begin as JSON objects do), and {} goes with rows",
            "rows": "rows, and {} goes with prose",
        }
        what = has["prose" if kind == "prose" else "rows"].format(", ".join(given))
        problems.append(f"--data {path} holds {what}")
    if problems:
        raise ConfigError("; ".join(problems))
    if args.predictions is not None:
        options.check_file("--predictions", args.predictions)


class _Opened(NamedTuple):
    models: dict[str | None, Any]
    bank: AdapterBank | None
    tokenizer: Tokenizer
    said: dict[str, Any]


def _open(args: Args) -> _Opened:
    """Loads the model, alone or by adapter."""
    bank = None
    models: dict[str | None, Any] = {}
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
    return _Opened(models, bank, tokenizer, said)


def _by_adapter(
    models: dict[str | None, Any],
    bank: AdapterBank | None,
    chosen: Sequence[str | None],
    score: Callable[[Any], Result],
) -> tuple[dict[str | None, dict[str, Any]], list[dict[str, Any]]]:
    """Returns each adapter's figures, over the rows that name it or over all; and all lines."""
    each: dict[str | None, dict[str, Any]] = {}
    if bank is not None and any(name is not None for name in chosen):
        result = score(bank)
        names = [name or BASE for name in chosen]
        for name in dict.fromkeys(names):
            each[name] = result.figures([i for i, n in enumerate(names) if n == name])
        pairs = zip(names, result.lines, strict=False)  # none where only losses are
        return each, [{"adapter": name, **line} for name, line in pairs]
    lines = []
    for name, model in models.items():
        result = score(model)
        each[name] = result.figures(range(len(chosen)))
        told = {} if name is None else {"adapter": name}
        lines += [{**told, **line} for line in result.lines]
    return each, lines


def _read_text(args: Args, path: Path) -> str:
    try:
        with open_bytes(path) as stream:
            return stream.read().decode()[: args.max_chars]
    except UnicodeDecodeError:
        raise DataError(f"--data {path} is not UTF-8 text") from None


def _text_tokens(
    args: Args, path: Path, tokenizer: Tokenizer, text: str, vocab_size: int
) -> tuple[list[int], int | None]:
    """Returns a text's ids, and the BOS that each window gets."""
    tokens = tokenizer.encode(text)
    bos = tokenizer.before[0] if args.bos and tokenizer.before else None
    if tokens[:1] == [bos]:  # each window gets its own
        tokens = tokens[1:]
    if wrong := sorted({token for token in tokens if token >= vocab_size}):
        raise DataError(
            f"--data {path} has ids {wrong[:20]}; the model's embedding has "
            f"{vocab_size} rows"
        )
    return tokens, bos


def _text_figures(
    args: Args, model: Any, tokens: list[int], bos: int | None
) -> dict[str, Any]:
    window = args.window
    if window is None:
        window = min(1024, model.config.max_position_embeddings - 1)
    return window_losses(
        model, tokens, window=window, bos_id=bos, batch_size=args.batch_size
    ).figures()


def _read_rows(
    args: Args, path: Path, tokenizer: Tokenizer, names: tuple[str, ...], size: int
) -> Dataset:
    template = options.run_template(args.data.chat_template, args.adapter)
    config = dataclasses.replace(args.data, chat_template=template)
    rows = read_dataset(path, tokenizer, config, adapters=names)
    check_ids(rows.rows, tokenizer, size)
    return rows


def _ask(
    args: Args, questions: list[Question], tokenizer: Tokenizer, vocab_size: int
) -> Asked:
    pool = None
    if args.shots_data is not None:
        if not args.shots_data.is_file():
            raise DataError(f"--shots-data {args.shots_data} is no file")
        pool = read_questions(args.shots_data, args.data)
    asked = ask(
        *(questions, tokenizer, args.data),
        form=args.choices_as,
        shots=args.shots,
        pool=pool,
    )
    beyond = {
        token
        for item in asked.items
        for token in (*item.tokens, *item.labels.flat)
        if token >= vocab_size
    }
    if beyond:
        raise DataError(
            f"--data {args.data_file} has ids {sorted(beyond)[:20]}; the model's embedding "
            f"has {vocab_size} rows"
        )
    return asked


def _of_rows(
    args: Args, rows: Dataset, tokenizer: Tokenizer, extract: Any, model: Any
) -> Result:
    losses = row_losses(model, rows, args.batch_size)
    if not args.exact_match:
        return Result(lambda picked: losses.of(picked).figures(), [])
    answers = exact_match(
        model,
        rows,
        tokenizer,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        extract=extract,
        stop=args.stop,
    )[1]

    def figures(picked: Sequence[int]) -> dict[str, Any]:
        mine = answer_figures([answers[i] for i in picked])
        return {**losses.of(picked).figures(), **mine}

    return Result(figures, [answer.line() for answer in answers])


def _of_choices(args: Args, asked: Asked, model: Any) -> Result:
    scored = score_choices(model, asked, args.batch_size)
    return Result(
        lambda picked: choice_figures([scored[i] for i in picked]),
        [one.line() for one in scored],
    )
