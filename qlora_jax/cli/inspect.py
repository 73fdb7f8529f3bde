"""`qlora inspect`: what a folder is, from its headers alone."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from flax import nnx

from pallas_kernels.formats import FORMATS, PackedWeight, stored_format, weight_of
from qlora_jax.adapters.algebra import cosine_similarity, update_norms
from qlora_jax.cli import options
from qlora_jax.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    QLoRAError,
)
from qlora_jax.exchange.ours import describe_adapter, misfits
from qlora_jax.exchange.steps import CHECKPOINTS, best, eval_loss_of, place_of, steps
from qlora_jax.exchange.verify import verify
from qlora_jax.models import hf_table
from qlora_jax.names import TABLES, dotted
from qlora_jax.sources.load import outline
from qlora_jax.sources.source import Source, open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Say what a model, GGUF file, run or adapter holds, without loading its weights."""

    folder: Annotated[str | None, tyro.conf.Positional] = None
    """A model's folder, GGUF file or hub id, a run folder, or an adapter folder."""

    model: str | None = None
    """A base: does the adapter in the folder fit it? (With --compare PEFT folders' base.)"""

    compare: tuple[str, str] | None = None
    """Two adapters: how large their updates are, and how alike."""

    verify: bool = False
    """Compare every byte of the folder with the digests that qlora_jax wrote into it, and name
    what is damaged, missing or added. Loading a model checks its tensors alone."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints the findings; returns them."""
    if (args.folder is None) == (args.compare is None):
        raise ConfigError("give a folder, or --compare and two adapters")
    if args.verify and (args.compare is not None or args.model is not None):
        raise ConfigError("--verify goes with a folder alone")
    if args.compare is not None:
        return _compared(args.compare, args.model)
    assert args.folder is not None
    folder = place_of(args.folder)
    if args.verify:
        found = verify(folder)
        print(f"{folder}: {found['files']} files are as they were written")
        for name in found["others"]:
            print(f"  {name} was added since; nothing reads it")
        return found
    is_model = (folder / "config.json").exists() or any(folder.glob("*.gguf"))
    if is_model or not folder.is_dir():
        if args.model is not None:
            raise AdapterMismatchError(
                f"{folder} is a model; --model goes with an adapter's folder"
            )
        found = _model(args.folder)
    else:
        found = describe_adapter(folder) | _checkpoints(folder / CHECKPOINTS)
        if args.model is not None:
            problems = misfits(folder, outline(args.model).model)
            found |= {"fits": not problems, "misfits": problems}
    for name, value in found.items():
        if isinstance(value, dict):
            print(name)
            for key, one in value.items():
                print(f"  {key:<22}{_said(one)}")
        else:
            print(f"{name:<24}{_said(value)}")
    return found


def _checkpoints(folder: Path) -> dict[str, Any]:
    """Says which checkpoints a run has, with their eval losses, and which is the best."""
    if not (there := steps(folder)):
        return {}
    least = best(folder, there)
    return {
        "checkpoints": {str(step): eval_loss_of(folder / str(step)) for step in there},
        **({"best_checkpoint": least[0], "best_eval_loss": least[1]} if least else {}),
    }


def _compared(paths: tuple[str, str], model: str | None) -> dict[str, Any]:
    a, b = options.open_adapters(paths, model)
    measured = {
        "norm of first": update_norms(a),
        "norm of second": update_norms(b),
        "cosine": cosine_similarity(a, b),
    }
    totals = {name: float(x.total) for name, x in measured.items()}
    options.print_figures(
        {
            name: {linear: float(value) for linear, value in x.linears.items()}
            for name, x in measured.items()
        },
        totals,
    )
    first, second, cosine = totals.values()
    return {"compared": list(paths), "norms": [first, second], "cosine": cosine}


def _model(name: str) -> dict[str, Any]:
    source = open_source(name)
    config, checkpoint = source.config, source.tensors
    table = hf_table(config)
    model, notes = outline(source)
    parameters, sizes = Counter(), Counter()
    kinds: Counter[str] = Counter()
    keys = _keys(checkpoint)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        part = _part(path)
        value, names = variable.get_value(), table.names(dotted(path))
        stack = value.stack if isinstance(value, PackedWeight) else ()
        parameters[part] += int(np.prod((*stack, *value.shape)))
        for tensor in names:
            stored_as = [checkpoint.stored(one) for one in keys[tensor]]
            sizes[part] += sum(size for _, size in stored_as)
            kinds[_stored_kind(tensor, stored_as, checkpoint)] += 1
    if not sizes:
        raise CheckpointError(f"{source} has no tensors")
    coded = {i.encoded.called for i in checkpoint.infos.values() if i.encoded}
    dense = Counter({k: n for k, n in kinds.items() if k not in coded | _PACKED})
    common = max(dense or kinds, key=(dense or kinds).__getitem__)
    return {
        "kind": "model",
        "format": "GGUF" if source.is_gguf else "Hugging Face folder",
        "family": config.model_type,
        "parameters": sum(parameters.values()),
        "bytes": sum(sizes.values()),
        "dtype": common,
        "quantization": (
            _listed(kinds)
            if source.is_gguf or source.encoding is not None
            else options.describe_quant(source, source.stored)
        ),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied_embedding": config.tie_word_embeddings,
        **_tokenizer(source),
        "notes": notes,
        "parameters_by_part": dict(parameters),
        "bytes_by_part": dict(sizes),
        "tensors_by_kind": dict(kinds),
    }


_PACKED = {form.CALLED for form in FORMATS.values()}


def _keys(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Returns each weight's keys: its own, and those of scales and tables."""
    keys: dict[str, list[str]] = {}
    for name in tensors:
        keys.setdefault(weight_of(name), []).append(name)
    return keys


def _stored_kind(
    name: str, stored: Sequence[tuple[str, int]], tensors: Collection[str]
) -> str:
    form = stored_format(tensors, name)
    return stored[0][0] if form is None else form.CALLED


def _listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({n} tensors)" for kind, n in kinds.items())


def _tokenizer(source: Source) -> dict[str, Any]:
    """Says whether a tokenizer opens, and what it brings."""
    try:
        tokenizer = source.tokenizer
    except QLoRAError as error:
        return {"tokenizer": False, "tokenizer_problem": str(error)}
    if tokenizer is None:
        return {"tokenizer": False}
    return {
        "tokenizer": True,
        "tokens": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template is not None,
    }


def _part(path: tuple) -> str:
    names = [str(part) for part in path]
    if "experts" in names:
        return "experts"
    known = {
        "embed_tokens": "embedding",
        "per_layer": "per-layer embedding",
        "lm_head": "head",
        "attn": "attention",
        "mlp": "feed-forward",
    }
    linear = names[-1] in ("kernel", "bias") and "router" not in names
    for name in names:
        if name in known and (linear or dotted(names[:-1]) in TABLES):
            return known[name]
    return "router" if "router" in names else "norms"


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value)) or "-"
    return str(value)
