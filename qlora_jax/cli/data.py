"""`qlora data`: what a run will see of its rows."""

import dataclasses
import os
import sys
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from qlora_jax.cli import options
from qlora_jax.cli.progress import RowsProgress
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, Dataset, check_ids
from qlora_jax.data.batches import Resolved, against_packing, resolve
from qlora_jax.data.fitting import taken
from qlora_jax.data.intake import Intake, counted, read_intakes
from qlora_jax.data.order import Share
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.objectives import make_objective
from qlora_jax.sources.source import open_source
from qlora_jax.text import Tokenizer

SHOWN = 700
"""Characters of one part of an example; longer ones are shortened in the middle."""

BAR = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Show what a run will see of its rows: forms, lengths, padding, what trains."""

    model: str
    """Hugging Face folder, GGUF file or hub id, for its tokenizer and chat template."""

    data_file: Annotated[tuple[str, ...], tyro.conf.arg(name="data")]
    """Rows, as `qlora train` takes them."""

    examples: int = 3
    """Rows to show: the first, and others that the seed draws."""

    add_tokens: tuple[str, ...] = ()
    """Texts that become one token each, as in training."""

    data: DataConfig = DataConfig()

    train: TrainConfig = TrainConfig()
    """The batches' size and order count here, and nothing else."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """Rows are read as this objective takes them; its settings are those of `qlora train`."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, options.with_objective(args), prog)


def run(args: Args) -> dict[str, Any]:
    """Prints what the rows are; returns the figures."""
    if args.examples < 0:
        raise ConfigError(f"--examples is {args.examples}, expected 0 or more")
    source = open_source(args.model)
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise DataError(f"{source} has no tokenizer.json, so rows cannot be tokenized")
    tokenizer = tokenizer.with_tokens(args.add_tokens)[0]
    with RowsProgress() as progress:
        intakes = read_intakes(
            *(args.data_file, tokenizer, args.data),
            keep=options.rows_folder(),
            progress=progress,
            kind=make_objective(args.objective).rows,
        )
    size = source.config.vocab_size
    if args.add_tokens:
        size = max(size, tokenizer.rows)
    console = Console(highlight=False, soft_wrap=True)
    sources, kept, shares = [], [], []
    for intake in intakes:
        check_ids(intake.formed.rows, tokenizer, size)
        said, rows = _source(console, intake, args.data)
        sources.append(said)
        numbers = np.arange(len(kept), len(kept) + len(rows))
        shares.append(Share(numbers, intake.source.weight))
        kept += rows
    figures: dict[str, Any] = {"model": args.model, "sources": sources}
    if not kept:
        return figures
    dataset = Dataset(kept, args.data.max_tokens, shares=shares)
    figures |= _lengths(console, kept) | _batches(console, dataset, args)
    order = np.random.default_rng(args.train.seed).permutation(np.arange(1, len(kept)))
    for i in [0, *order.tolist()][: args.examples]:
        _show(console, kept[i], tokenizer)
        if (other := kept[i].other) is not None:
            _show(console, other, tokenizer, "beside it, ")
    return figures


def _source(
    console: Console, intake: Intake, config: DataConfig
) -> tuple[dict[str, Any], list[Row]]:
    """Prints what a source has, and what of it a run takes; returns both."""
    formed, name = intake.formed, intake.problems.name
    console.print(f"{name}: {counted(formed)}")
    one = taken(formed.rows, name, config)
    limit = config.max_tokens
    lines = [(one.cut, f"over {limit} tokens are cut")]
    lines += [(one.split, f"over {limit} tokens are split")]
    lines += [(one.long, f"over {limit} tokens are left out")]
    lines += [
        (one.refused, f"over {limit} tokens: a run refuses them (--data.too-long)")
    ]
    lines += [(one.empty, "have nothing to learn and are left out")]
    for count, text in lines:
        if count:
            console.print(f"  {count} of {len(formed.rows)} rows {text}")
    weight = intake.source.weight
    if weight != 1:
        share = Share(np.arange(max(1, len(one.rows))), weight)
        console.print(f"  weight {weight:g}: {share.count} rows in an epoch")
    said = {
        "name": name,
        "rows": formed.read,
        "examples": len(formed.rows),
        "taken": len(one.rows),
        "cut": one.cut,
        "split": one.split,
        "left_out_for_length": one.long,
        "refused_for_length": one.refused,
        "nothing_to_learn": one.empty,
        "forms": dict(formed.forms),
        "unused_fields": dict(formed.unused),
        "unread_by_template": dict(formed.unread),
        **({"weight": weight} if weight != 1 else {}),
    }
    return said, one.rows


def _lengths(console: Console, rows: list[Row]) -> dict[str, Any]:
    """Prints how long rows are; returns it."""
    every = [one for row in rows for one in (row, row.other) if one is not None]
    lengths = np.array([len(row.tokens) for row in every])
    trained = sum(int(np.count_nonzero(row.weights[1:])) for row in every)
    median, most = np.percentile(lengths, (50, 95))
    figures = {
        "tokens": int(lengths.sum()),
        "tokens_that_train": trained,
        "mean_tokens": float(lengths.mean()),
        "median_tokens": float(median),
        "p95_tokens": float(most),
        "longest": int(lengths.max()),
    }
    console.print(
        f"\n{figures['tokens']:,} tokens, of which {trained / figures['tokens']:.0%} train; a "
        f"row has {figures['mean_tokens']:.0f} (median {median:.0f}, 95 % up to {most:.0f}, "
        f"longest {figures['longest']})"
    )
    width = 16
    while lengths.max() / width > 16:
        width *= 2
    counts = np.bincount((lengths - 1) // width)
    figures["histogram"] = {"width": width, "counts": counts.tolist()}
    for i, count in enumerate(counts.tolist()):
        if not counts[: i + 1].any():
            continue
        bar = "█" * round(BAR * count / counts.max())
        console.print(f"  {i * width + 1:>7} to {(i + 1) * width:<7} {count:>8} {bar}")
    return figures


def _batches(console: Console, dataset: Dataset, args: Args) -> dict[str, Any]:
    """Prints what an epoch's batches are, packed and not; returns those of the run."""
    train, objective = args.train, make_objective(args.objective)
    against = against_packing(dataset, objective.packs, objective.name)
    chosen = resolve(args.data.packing, dataset, objective.packs, objective.name)
    ways: list[Resolved] = [chosen, *(() if against else ("on",)), "off"]
    made = {
        way: dataset.batches(
            documents=train.micro_batch * train.grad_accum,
            micro_batch=train.micro_batch,
            seed=train.seed,
            packing=way,
        )
        for way in ways
    }
    for way, batches in made.items():
        lengths = ", ".join(
            f"{length} ({count})"
            for length, count in sorted(batches.steps_by_length.items())
        )
        run = " (this run)" if way == chosen else ""
        console.print(
            f"\npacking {way}{run}: {batches.said()}; {batches.steps(1)} steps an epoch; "
            f"lengths (steps): {lengths}"
        )
    if against:
        console.print(f"rows are not packed: {against}")
    batches = made[chosen]
    return {
        "packing": chosen,
        "steps_per_epoch": batches.steps(1),
        "rows_per_step": batches.rows,
        "documents_per_step": batches.documents,
        "padding": batches.padding,
        **{
            f"padding_{name}": made[way].padding
            for name, way in (("packed", "on"), ("unpacked", "off"))
            if way in made
        },
        "batch_lengths": {
            str(length): count
            for length, count in sorted(batches.steps_by_length.items())
        },
    }


def _show(console: Console, row: Row, tokenizer: Tokenizer, beside: str = "") -> None:
    """Prints a row's text, what trains in green, or between marks without colours."""
    colours = console.is_terminal and not os.environ.get("NO_COLOR")
    count = int(np.count_nonzero(row.weights))
    ways = "in green" if colours else "between ⟦ and ⟧"
    console.print(
        f"\n--- {beside}{len(row.tokens)} tokens; the {count} that train are {ways}"
    )
    text = Text()
    ends = np.flatnonzero(np.diff(row.weights)) + 1
    shown = ""
    for start, end in zip([0, *ends], [*ends, len(row.tokens)], strict=True):
        whole = tokenizer.text_of(row.tokens[:end].tolist())
        part, shown = whole[len(shown) :], whole
        if len(part) > SHOWN:
            left = len(part) - SHOWN
            half = SHOWN // 2
            part = f"{part[:half]} [... {left} characters ...] {part[-half:]}"
        weight = float(row.weights[start])
        if not weight:
            text.append(part)
            continue
        mark = "" if weight == 1 else f"(weight {weight:g}) "
        text.append(
            part if colours else f"⟦{mark}{part}⟧", style="green" if colours else ""
        )
    console.print(text)
    sys.stdout.flush()
