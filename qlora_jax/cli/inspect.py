"""`qlora inspect`: what a folder is, from its headers alone."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from flax import nnx

from qlora_jax.adapters.algebra import cosine_similarity, update_norms
from qlora_jax.cli import options
from qlora_jax.errors import AdapterMismatchError, CheckpointError, ConfigError
from qlora_jax.io import bitsandbytes
from qlora_jax.io.adapter import describe_adapter, misfits
from qlora_jax.io.hf import find, hf_names, outline, read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Say what a model, run or adapter folder holds, without loading its weights."""

    folder: Annotated[str | None, tyro.conf.Positional] = None
    """A model's folder or hub id, a run folder, or an adapter folder."""

    model: str | None = None
    """A base: does the adapter in the folder fit it? (With --compare PEFT folders' base.)"""

    compare: tuple[str, str] | None = None
    """Two adapters: how large their updates are, and how alike."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints the findings; returns them."""
    if (args.folder is None) == (args.compare is None):
        raise ConfigError("give a folder, or --compare and two adapters")
    if args.compare is not None:
        return _compared(args.compare, args.model)
    assert args.folder is not None
    folder = Path(args.folder)
    if (folder / "config.json").exists() or not folder.exists():
        if args.model is not None:
            raise AdapterMismatchError(
                f"{folder} is a model; --model goes with an adapter's folder"
            )
        found = _model(args.folder)
    else:
        found = describe_adapter(folder)
        if args.model is not None:
            problems = misfits(folder, outline(args.model)[0])
            found |= {"fits": not problems, "misfits": problems}
    for name, value in found.items():
        if isinstance(value, dict):
            print(name)
            for key, one in value.items():
                print(f"  {key:<22}{_said(one)}")
        else:
            print(f"{name:<24}{_said(value)}")
    return found


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
    folder = find(name)
    hf, family, config, stored = read_config(folder)
    model, checkpoint = outline(folder)
    parameters, sizes = Counter(), Counter()
    dtypes: Counter[str] = Counter()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        part = _part(path)
        parameters[part] += int(np.prod(variable.get_value().shape))
        for tensor in hf_names(family.NAMES[".".join(map(str, path))], config)[0]:
            names = [tensor, *(n for n in checkpoint if _belongs(n, tensor))]
            for one in names:
                info = checkpoint.infos[one]
                sizes[part] += int(np.prod(info.shape)) * info.dtype.itemsize
            if len(names) == 1:
                dtypes[checkpoint.infos[tensor].dtype.name] += 1
    if not sizes:
        raise CheckpointError(f"{folder} has no tensors")
    return {
        "kind": "model",
        "family": hf["model_type"],
        "parameters": sum(parameters.values()),
        "bytes": sum(sizes.values()),
        "dtype": max(dtypes, key=dtypes.__getitem__),
        "quantization": options.describe_quant(folder, stored),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied_embedding": config.tie_word_embeddings,
        "tokenizer": (folder / "tokenizer.json").exists(),
        "parameters_by_part": dict(parameters),
        "bytes_by_part": dict(sizes),
    }


def _belongs(name: str, weight: str) -> bool:
    if name == bitsandbytes.scales_name(weight):
        return True
    return name.startswith(f"{weight}.") and bitsandbytes.is_part(name)


def _part(path: tuple) -> str:
    names = [str(part) for part in path]
    if "experts" in names:
        return "experts"
    known = {
        "embed_tokens": "embedding",
        "lm_head": "head",
        "attn": "attention",
        "mlp": "feed-forward",
    }
    linear = names[-1] in ("kernel", "bias")
    for name in names:
        if name in known and (linear or name == "embed_tokens"):
            return known[name]
    return "router" if "router" in names else "norms"


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "-"
    return str(value)
