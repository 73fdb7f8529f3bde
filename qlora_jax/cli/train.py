"""`qlora train`: fine-tune an adapter, or resume a run."""

import contextlib
import dataclasses
import datetime
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import tyro

from qlora_jax.adapters.attach import attach_zero
from qlora_jax.budget.host import available_host_bytes
from qlora_jax.cli import memory, options, resume, start, stopping
from qlora_jax.cli.asked import asked_beforehand
from qlora_jax.cli.begin import (
    beginning,
    check_run_folder,
    made,
    withdrawn_unless_saved,
)
from qlora_jax.cli.progress import RowsProgress, TrainProgress
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig
from qlora_jax.config.run import FILE, RunConfig, as_written_now, read_run, write_run
from qlora_jax.data import Dataset, check_ids, read_dataset
from qlora_jax.data.fields import REFERENCE
from qlora_jax.data.sources import parse_sources
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.exchange.steps import BEGUN
from qlora_jax.files import check_output
from qlora_jax.objectives import make_objective
from qlora_jax.sources.identity import identity_of
from qlora_jax.sources.load import load
from qlora_jax.sources.source import Source, open_source
from qlora_jax.sources.tokens import add_tokens
from qlora_jax.text import Tokenizer
from qlora_jax.text.clock import stopped_at
from qlora_jax.toml import from_dict, read_toml
from qlora_jax.train.lock import locked
from qlora_jax.train.loop import Trainer
from qlora_jax.train.metrics import eval_losses, read_metrics
from qlora_jax.train.report import write_report
from qlora_jax.train.steps import batches_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(memory.Auto):
    """Fine-tune an adapter on a 4-bit base (a dense folder is quantized as it loads)."""

    out: str | None = None
    """The run folder: config, metrics, checkpoints, adapter, report."""

    resume: str | None = None
    """Continue this run folder exactly. Settings that make no other run may be given anew:
    more --train.max-steps, when to save and evaluate, where arrays rest, micro-batches of the
    same rows a step. What each means for exactness is said."""

    config: str | None = None
    """TOML file whose values replace the defaults; flags replace both."""

    overwrite: bool = False
    """Start anew in a run folder, replacing that run."""

    before: tyro.conf.Suppress[RunConfig | None] = None
    """The settings that the run to resume had."""

    begun: tyro.conf.Suppress[str | None] = None
    """When the run to resume was begun."""

    @property
    def run(self) -> RunConfig:
        """The settings that are the run's, wherever it is called from."""
        names = [field.name for field in dataclasses.fields(RunConfig)]
        return _anywhere(RunConfig(**{name: getattr(self, name) for name in names}))


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags, over the values of --config, or of the run that --resume names."""
    default, args = None, options.with_objective(args)
    given = {name: _value_of(name, args) for name in ("--config", "--resume")}
    if given["--resume"] is not None:
        with_it = ("--config", "--out", "--overwrite")
        if wrong := [flag for flag in with_it if _is_given(flag, args)]:
            raise ConfigError(f"{', '.join(wrong)}: does not go with --resume")
        out = Path(given["--resume"])
        now, before, begun = resume.settings(out)
        default = Args(**vars(now), resume=str(out), before=before, begun=begun)
    elif given["--config"] is not None:
        values, path = read_toml(Path(given["--config"])), given["--config"]
        if hidden := [name for name in ("auto", "before", "begun") if name in values]:
            raise ConfigError(f"{path}: {', '.join(hidden)}: no setting of a run")
        default = from_dict(Args, as_written_now(values), path)
    rest, auto = _without_auto(args)
    parsed = options.parse(Args, rest, prog, default)
    return dataclasses.replace(parsed, auto=auto) if auto else parsed


def _value_of(flag: str, args: list[str]) -> str | None:
    """Returns the value of a flag, before the flags are parsed."""
    found = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{flag}="):
            found = arg.partition("=")[2]
    return found


def _is_given(flag: str, args: list[str]) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in args)


def _without_auto(args: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Takes `--train.micro-batch auto` and `--train.offload auto` out of the flags."""
    rest, auto = list(args), []
    for name in ("micro_batch", "offload"):
        flag = f"--train.{name.replace('_', '-')}"
        for i, arg in enumerate(rest):
            if arg == f"{flag}=auto":
                del rest[i]
            elif arg == flag and rest[i + 1 : i + 2] == ["auto"]:
                del rest[i : i + 2]
            else:
                continue
            auto.append(name)
            break
    return rest, tuple(auto)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    if args.resume is not None:
        out, now = Path(args.resume), args.run
        assert args.before is not None  # `parse` gives it with --resume
        if not now.model:
            raise ConfigError(
                f"{out / FILE} names no model, so it is not as a run wrote it; bring it back, "
                "or start anew"
            )
        for line in resume.check_changes(out, args.before, now):
            print(line, file=sys.stderr)
        with locked(out):
            return train(dataclasses.replace(args, **vars(now)), out, resuming=True)
    given = {"--model": args.model, "--data": args.data_file, "--out": args.out}
    if missing := [flag for flag, value in given.items() if not value]:
        raise ConfigError(f"{', '.join(missing)} missing; or give --resume RUN")
    out = Path(str(args.out))
    if not args.overwrite:
        resume.refuse_taken(out)
    check_output(out, args.overwrite)
    return train(args, out, resuming=False)


def train(args: Args, out: Path, *, resuming: bool) -> dict[str, Any]:
    """Trains as a resolved config says; writes the run folder."""
    begun = args.begun or datetime.datetime.now().isoformat()
    with stopped_at(begun):  # what templates write is the run's, whenever it goes on
        return _train(dataclasses.replace(args, begun=begun), out, resuming)


def _train(args: Args, out: Path, resuming: bool) -> dict[str, Any]:
    # What is wrong with objective, rows or memory is found before the model is loaded.
    objective = make_objective(args.objective)
    source, quant = open_base(args, out, resume=resuming)
    if not resuming:
        check_run_folder(out, args.overwrite)
    rows, held = checked_rows(args, source)
    late = (REFERENCE,) if args.objective.precompute_reference else ()
    batches = batches_of(rows, args.train, objective, args.data.packing, late)
    args = memory.within_memory(args, source, quant, batches)
    model, lora, added, started = adapted(args, source, quant, rows, resume=resuming)
    if args.objective.precompute_reference:
        rows, held = asked_beforehand(args.run, source, model, rows, held)
    with (
        made(out),  # not before all input was found good
        locked(out),
        TrainProgress() as progress,
        stopping.finishing() as stop,
    ):
        if not resuming:
            with beginning(out, args.run):
                if makes_a_base(args):
                    start.save_base(model, out, source)
                    source = open_source(start.saved_base(out))
        with withdrawn_unless_saved(out) if not resuming else contextlib.nullcontext():
            trainer = Trainer(
                model,
                rows,
                args.train,
                out,
                evaluation=held,
                lora=lora,
                objective=objective,
                packing=args.data.packing,
                tokenizer=added,
                progress=progress,
                identity=identity(args, source),
            )
            if resuming:
                restore(trainer, args)
            progress.expect(trainer.steps)
            with memory.advised(
                lambda: memory.setup_of(args, source, quant, trainer.batches),
                memory.memory_limit(args),
                available_host_bytes(),
            ):
                figures = trainer.fit(resume=resuming, stop=stop)
        figures = {
            "out": str(out),
            **({} if trainer.finished else {"finished": False}),
            **figures,
            "rows": len(rows),
            "rows_left_out": rows.dropped,
            "base": options.describe_quant(source, quant, args.quant.mxfp4),
            **({"base_folder": str(out / start.BASE)} if makes_a_base(args) else {}),
            **started,
            **sizes(trainer),
        }
        figures |= _eval_losses(out)
        write_report(out, figures, objective)
    if not trainer.finished:
        print(
            f"stopped after step {trainer.state.step} of {trainer.steps}, which is saved; "
            f"to go on: {resume.command(out)}",
            file=sys.stderr,
        )
    return figures


def identity(args: Args, source: Source) -> dict[str, str]:
    """Returns digests of what a run reads beside its rows, for its checkpoints."""
    found = {f"base.{name}": value for name, value in identity_of(source).items()}
    found[BEGUN] = str(args.begun)
    if args.data.chat_template is not None:
        found["chat_template"] = _template_digest(args.data.chat_template)
    return found


def _template_digest(template: str) -> str:
    """Returns the sha256, in hex, of a template's file; of a name or a text, that of itself."""
    try:
        a_file = Path(template).is_file()
    except (OSError, ValueError):  # no path can be so long, or have a null byte
        a_file = False
    text = template.encode("utf-8", "surrogateescape")
    return hashlib.sha256(Path(template).read_bytes() if a_file else text).hexdigest()


def restore(trainer: Trainer, args: Args) -> None:
    """Takes a run up where its newest whole checkpoint left it, with settings that changed.

    Raises:
      CheckpointError: see `Trainer.restore`.
      ConfigError: the run is to end before that checkpoint.
    """
    assert args.before is not None  # `parse` gives it with --resume
    before, now, steps = args.before.train, args.train, trainer.batches.steps
    ends = {config.steps(steps) for config in (before, now)}
    trainer.restore(may_differ={"steps"} if len(ends) > 1 else ())
    end = resume.other_end(before, now, steps, trainer.start)
    if end is not None:
        print(end, file=sys.stderr)
    if args.run != read_run(trainer.out):
        write_run(trainer.out, args.run)


def makes_a_base(args: Args) -> bool:
    """Whether a run changes the 4-bit base, and so keeps its own."""
    return args.lora.init == "pissa"


def open_base(
    args: Args, out: Path, *, resume: bool
) -> tuple[Source, QuantConfig | None]:
    """Opens what a run's base is read from, and says how to quantize it as it loads.

    Returns:
      (source, its quantization; None where its weights are taken as they are).
    """
    own = makes_a_base(args)
    source = open_source(start.saved_base(out) if own and resume else str(args.model))
    if own and not resume:
        start.check_own_base(
            source, out, args.lora, args.quant, args.add_tokens, args.original
        )
    auto = QuantConfig(
        block_size=args.quant.block_size, double_quant=args.quant.double_quant
    )
    return source, options.held_linears(args.quant, source, auto=auto)


def checked_rows(args: Args, source: Source) -> tuple[Dataset, Dataset | None]:
    """Returns the rows to train on, and those held out, which the model has tokens for.

    Raises:
      DataError: the model has no tokenizer, or the rows cannot be used.
    """
    if source.tokenizer is None:
        raise DataError(f"{source} has no tokenizer.json, so rows cannot be tokenized")
    larger = source.tokenizer.with_tokens(args.add_tokens)[0]
    rows, held = read_rows(args, larger)
    if held is None and args.data.eval_rows:
        rows, held = rows.split(args.data.eval_rows, args.train.seed)
    size = source.config.vocab_size
    if args.add_tokens:  # the embedding grows with them
        size = max(size, larger.rows)
    for some in (rows, held):
        if some is not None:
            check_ids(some.rows, larger, size)
    return rows, held


def adapted(
    args: Args,
    source: Source,
    quant: QuantConfig | None,
    rows: Dataset,
    *,
    resume: bool,
) -> tuple[Any, LoRAConfig, Tokenizer | None, dict[str, float]]:
    """Loads the base and attaches the adapter that a run begins with.

    Returns:
      (model, the adapter's config, the tokenizer where tokens were added, figures of how
      the adapter starts).
    """
    zero = resume or args.lora.init == "zero"
    model, tokenizer = load(
        source,
        quant,
        args.train.compute_dtype,
        # Measuring what quantization lost runs the base, and compares it, on the device.
        stream=args.train.stream and zero,
        **options.held_tables(args.quant, source),
    )
    lora, added = args.lora, None
    if args.add_tokens:
        assert tokenizer is not None  # `checked_rows` refuses a source without one
        model, added, ids = add_tokens(model, tokenizer, args.add_tokens)
        if "embed_tokens" not in lora.modules_to_save:
            tokens = tuple(dict.fromkeys((*lora.tokens, *ids)))
            lora = dataclasses.replace(lora, tokens=tokens)
    key = jax.random.key(args.train.seed)
    if zero:
        # The factors of a run that goes on come from its checkpoint.
        return attach_zero(model, lora, key=key), lora, added, {}
    original = args.original or source
    model, started = start.compensated(
        model, original, lora, args.train, args.data, rows, key
    )
    return model, lora, added, started


def read_rows(args: Args, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Returns the rows to train on, and those to evaluate on where they are given.

    Raises:
      DataError: they cannot be used; or those to evaluate on have weights.
    """
    given = parse_sources(args.eval_file) if args.eval_file else []
    if weighted := [source for source in given if source.weight != 1]:
        raise DataError(
            f"--eval-data {weighted[0]}: every row is evaluated once; give it without a weight"
        )
    keep = options.rows_folder()
    with RowsProgress() as progress:
        more: dict[str, Any] = {"keep": keep, "progress": progress}
        more["kind"] = make_objective(args.objective).rows
        rows = read_dataset(args.data_file, tokenizer, args.data, **more)
        if not args.eval_file:
            return rows, None
        held = read_dataset(args.eval_file, tokenizer, args.data, **more)
    return rows, held


def _anywhere(config: RunConfig) -> RunConfig:
    """Returns the same run with paths that do not depend on the working folder."""

    def absolute(path: str | None) -> str | None:
        try:
            there = path is not None and Path(path).exists()
        except (OSError, ValueError):  # no path, but a template's text
            there = False
        return str(Path(str(path)).resolve()) if there else path

    def sources(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parse_sources(texts))) if texts else ()

    data = dataclasses.replace(
        config.data,
        chat_template=absolute(config.data.chat_template),
        prompt_template=absolute(config.data.prompt_template),
    )
    return dataclasses.replace(
        config,
        data=data,
        model=absolute(config.model),
        original=absolute(config.original),
        data_file=sources(config.data_file),
        eval_file=sources(config.eval_file),
    )


def sizes(trainer: Trainer) -> dict[str, int]:
    """Returns the bytes of base, adapter and optimizer state."""
    parts = {
        "base_bytes": trainer.base,
        "adapter_bytes": trainer.lora,
        "optimizer_bytes": trainer.opt_state,
    }
    return {
        name: sum(x.nbytes for x in jax.tree.leaves(tree))
        for name, tree in parts.items()
    }


def _eval_losses(out: Path) -> dict[str, float]:
    losses = [loss for _, loss in eval_losses(read_metrics(out / "metrics.jsonl"))]
    if not losses:
        return {}
    return {"eval_loss_before": losses[0], "eval_loss": losses[-1]}
