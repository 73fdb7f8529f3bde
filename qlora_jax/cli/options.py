"""What subcommands share: parsing flags, loading a base with its adapter, tables."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.adapters.value import Adapter, other_base
from qlora_jax.config.quant import Mxfp4Use, QuantConfig, QuantOptions
from qlora_jax.config.run import has_run, read_run
from qlora_jax.data import cache
from qlora_jax.errors import (
    AdapterMismatchError,
    ConfigError,
    OutputExistsError,
    gathered,
)
from qlora_jax.exchange.find import adapter_tokenizer, changed_base
from qlora_jax.exchange.ours import load_adapter
from qlora_jax.exchange.peft import import_peft, is_peft
from qlora_jax.exchange.read import read_adapter
from qlora_jax.exchange.steps import place_of
from qlora_jax.sources.hub import find
from qlora_jax.sources.load import Tables, load, outline, resolve_tables
from qlora_jax.sources.source import Source, open_source
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.user_folder import cache_folder

T = TypeVar("T")

logger = logging.getLogger(__name__)


def held_tables(quant: QuantOptions, source: Source) -> Tables:
    """Returns how `load` will hold embedding, head and experts that are in MXFP4.

    Raises:
      CheckpointError: the folder has them in int8, and they are to be 4-bit.
    """
    return resolve_tables(source, quant.embedding, quant.head, quant.mxfp4)


def held_linears(
    quant: QuantOptions, source: Source, *, auto: QuantConfig | None
) -> QuantConfig | None:
    """Returns how to quantize a source; None to take its weights as they are.

    Args:
      quant: The user's flags for quantization.
      source: The opened checkpoint of the model.
      auto: The settings that 'auto' quantizes a dense source with; None leaves it dense.

    Raises:
      ConfigError: 'none' for a folder that is 4-bit.
    """
    if quant.codebook == "auto":
        return None if source.stored is not None else auto
    if quant.codebook == "none":
        if source.stored is not None:
            raise ConfigError(
                f"--quant.codebook none: {source} holds 4-bit weights; give the "
                "original folder for a dense model"
            )
        return None
    return quant.config()


def describe_quant(
    source: Source, quant: QuantConfig | None, mxfp4: Mxfp4Use = "keep"
) -> str:
    """Says in a few words how a base is held, for output.

    Args:
      source: The opened checkpoint of the base.
      quant: The quantization of its dense linears; None for none.
      mxfp4: What becomes of experts that it has in MXFP4.
    """
    quant = quant or source.stored
    tables = resolve_tables(source, "none", "none", mxfp4)
    experts = "experts in MXFP4, else " if tables["mxfp4"] == "keep" else ""
    if quant is None:
        return f"{experts}dense"
    double = "double-quantized" if quant.double_quant else "float32"
    return f"{experts}{quant.codebook}, block {quant.block_size}, {double} absmax"


def open_base(model: str, adapter: str | None) -> Source:
    """Opens --model, or of the base that the adapter's run made of it.

    Raises:
      AdapterMismatchError: the run made its base of another model.
    """
    source = open_source(model)
    own = None if adapter is None else changed_base(adapter)
    if own is None or own.samefile(source.path):
        return source
    base = open_source(own)
    mark = fingerprint(outline(base).model)
    assert mark is not None
    if problem := other_base(outline(source).model, json.loads(mark)):
        raise AdapterMismatchError(
            f"{adapter} goes with the 4-bit base in {own}, which was not made of --model "
            f"{model}: {problem}"
        )
    print(f"the base is {own}, which goes with the adapter", file=sys.stderr)
    return base


def open_model(
    model: str, adapter: str | None, quant: QuantOptions, dtype: str
) -> tuple[Any, Tokenizer | None, dict[str, Any]]:
    """Loads a base and, if given, its adapter, for evaluate and generate.

    With 'auto' a dense folder is quantized as the run that made the adapter did, so
    that what is evaluated is what was trained; without an adapter it stays dense.

    Returns:
      (model, tokenizer, what to say of it).
    """
    base, tokenizer, said = _open_base(
        model, [adapter] if adapter else [], quant, dtype
    )
    if adapter is not None:
        base = load_adapter(adapter, base)
        tokenizer = adapter_tokenizer(adapter, tokenizer)
        said["adapter"] = adapter
    return base, tokenizer, said


def run_template(chosen: str | None, adapter: str | None) -> str | None:
    """Returns the chat template that was asked for, or that the adapter's run had."""
    if chosen is not None or adapter is None:
        return chosen
    run = place_of(adapter)
    return read_run(run).data.chat_template if has_run(run) else None


def open_bank(
    model: str, adapters: Sequence[str], quant: QuantOptions, dtype: str
) -> tuple[AdapterBank, Tokenizer | None, dict[str, Any]]:
    """Loads a base and several adapters for it, given as NAME=FOLDER.

    Returns:
      (bank, tokenizer, what to say of it).

    Raises:
      ConfigError: something that is no NAME=FOLDER, names given twice, or runs that held
        the base in different ways.
      AdapterMismatchError: adapters that do not fit; all are named.
    """
    problems, paths = [], {}
    for text in adapters:
        name, _, path = text.partition("=")
        if not (name and path):
            problems.append(f"{text!r}, expected NAME=FOLDER")
        elif name in paths:
            problems.append(f"{name} twice")
        paths[name] = path
    if problems:
        raise ConfigError("--adapters: " + "; ".join(problems))
    base, tokenizer, said = _open_base(model, list(paths.values()), quant, dtype)
    read = {}
    for name, path in paths.items():
        try:
            read[name] = Adapter.of(load_adapter(path, base))
        except AdapterMismatchError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise AdapterMismatchError(gathered("--adapters cannot be used", problems))
    return AdapterBank.of(base, read), tokenizer, {**said, "adapters": paths}


def _open_base(
    model: str, adapters: Sequence[str], quant: QuantOptions, dtype: str
) -> tuple[Any, Tokenizer | None, dict[str, Any]]:
    """Loads a base as the runs held it that made the adapters."""
    # Several adapters share --model: one of a base of its own is refused as it loads.
    source = open_base(model, adapters[0] if len(adapters) == 1 else None)
    held: dict[str, QuantOptions] = {}
    for adapter in adapters:
        if has_run(place := place_of(adapter)):
            held[adapter] = read_run(place).quant
    if quant == QuantOptions() and len(set(held.values())) > 1:
        ways = "; ".join(f"{adapter}: {run}" for adapter, run in held.items())
        raise ConfigError(
            f"the adapters' runs held the base in different ways; choose by --quant: {ways}"
        )
    auto: QuantConfig | None = None
    tables = quant
    for run in held.values():
        if run.codebook != "none":
            auto = run.config()
            asked = {quant.embedding, quant.head} != {"none"} or quant.mxfp4 != "keep"
            tables = quant if asked else run
    chosen = held_linears(quant, source, auto=auto)
    base, tokenizer = load(source, chosen, dtype, **held_tables(tables, source))
    said = {"model": model, "base": describe_quant(source, chosen, tables.mxfp4)}
    if source.path != find(model):
        said["base_folder"] = str(source)
    return base, tokenizer, said


def open_adapters(paths: Sequence[str], model: str | None) -> list[Adapter]:
    """Reads adapters as values; PEFT folders by the names of a base.

    Raises:
      ConfigError: a PEFT folder without a base.
    """
    peft = [path for path in paths if is_peft(path)]
    if peft and model is None:
        raise ConfigError(
            f"{', '.join(peft)}: a PEFT adapter's names are those of its base; give --model"
        )
    if not peft:
        return [read_adapter(path) for path in paths]
    base, _ = load(str(model), None)
    return [
        Adapter.of(import_peft(path, base)) if path in peft else read_adapter(path)
        for path in paths
    ]


def rows_folder() -> Path | None:
    """Returns where tokenized rows are kept; None where they are not."""
    try:
        return cache_folder(cache.VARIABLE, "rows")
    except RuntimeError as error:
        logger.warning("tokenized rows are not kept: %s", error)
        return None


def check_file(flag: str, path: Path) -> None:
    """Refuses a file to write that is there, or whose folder is not.

    Raises:
      OutputExistsError: something is at the path.
      ConfigError: it is in no folder.
    """
    if path.exists():
        kind = "a folder" if path.is_dir() else "a file already"
        raise OutputExistsError(
            f"{flag} {path} is {kind}; give a file that is not there"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: {path.parent} is no folder")


def describe_ranks(adapter: Adapter) -> dict[str, Any]:
    """Returns an adapter's rank, and others by linear, for output."""
    config = adapter.config
    return {"rank": config.rank, "rank_pattern": config.rank_pattern}


def print_figures(
    columns: dict[str, dict[str, float]], totals: dict[str, float]
) -> None:
    """Prints figures of linears, a line each, and of all together."""
    print(f"{'':<40}" + "".join(f"{name:>16}" for name in columns))
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = [column.get(name, 0.0) for column in columns.values()]
        print(f"{name:<40}" + "".join(f"{value:>16.5g}" for value in values))
    print(f"{'all':<40}" + "".join(f"{totals[name]:>16.5g}" for name in columns))


def with_objective(args: Sequence[str]) -> list[str]:
    """Returns flags with `--objective NAME` as the setting that it is short for.

    Raises:
      ConfigError: `--train.objective`, its name in older versions, is given.
    """
    if old := [a for a in args if re.match(r"--train[.]objective(=|$)", a)]:
        raise ConfigError(
            f"{old[0]} is --objective now: --objective dpo, --objective module:name"
        )
    return [re.sub(r"^--objective(?==|$)", "--objective.name", arg) for arg in args]


def parse(cls: type[T], args: list[str], prog: str, default: T | None = None) -> T:
    """Parses flags into a dataclass; wrong flags end with status 2."""
    if default is None:
        return tyro.cli(cls, args=args, prog=prog, description=cls.__doc__)
    return tyro.cli(cls, args=args, prog=prog, description=cls.__doc__, default=default)
