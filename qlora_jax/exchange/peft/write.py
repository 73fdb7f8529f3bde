"""Writing a PEFT folder from a model with an adapter."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.adapters.attach import split
from qlora_jax.adapters.attached import lora_config
from qlora_jax.adapters.names import flatten
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import ConfigError, OutputExistsError
from qlora_jax.exchange.peft.mixture import of_mixture
from qlora_jax.exchange.peft.names import (
    CONFIG,
    ENDS,
    PREFIX,
    TENSORS,
    is_peft,
    module_names,
)
from qlora_jax.files import new_folder
from qlora_jax.models import Decoder
from qlora_jax.names import EMBEDDING, HEAD, Numbered
from qlora_jax.sources.writer import write_tensors
from qlora_jax.text.folder import check_copies, copy_tokenizer, refuse_another
from qlora_jax.text.tokenizer import Tokenizer


def export_peft(
    path: str | os.PathLike[str],
    model: Decoder,
    *,
    base: str | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the adapter of a model as a PEFT folder.

    An adapter that began as what quantization lost (LoRAConfig.init) is written as it is;
    it belongs to the 4-bit base in PEFT too: with init 'pissa' to the base of its own, which
    must travel with it. Where tokens were added, PEFT's base must be
    resized before it loads the adapter, as PEFT's own users do.

    Args:
      path: The folder.
      model: A Decoder with an adapter.
      base: base_model_name_or_path, which PEFT loads the base from; needed for 'pissa'. It
        is written as it is given; None leaves it out.
      tokenizer: What is put beside the adapter, with its chat templates: a tokenizer, or the
        folder whose tokenizer files are copied.
      overwrite: Replace an adapter that is there.

    Raises:
      OutputExistsError: the folder has an adapter and overwrite is false, or is a file; or it
        has a tokenizer's files that would be taken for this one's.
      OutputError: the folder cannot be written; one that was there is as it was.
      AdapterMismatchError: an adapter of experts that PEFT cannot hold, see
        `mixture.of_mixture`.
      ConfigError: one with init 'pissa', and no base is named.
    """
    out = Path(path)
    if out.is_file() or (is_peft(out) and not overwrite):
        raise OutputExistsError(
            f"{out} exists; choose another folder, or pass overwrite to replace it"
        )
    names, config = module_names(model.config), lora_config(model)
    if config.init == "pissa" and base is None:
        raise ConfigError(
            "this adapter's init is pissa, which changed its base, so PEFT must open that one: "
            "give base=, the folder of RUN/base or of save_model(detach(model), folder)"
        )
    flat = {name: np.asarray(x) for name, x in flatten(split(model)[1]).items()}
    mixture = of_mixture(config, flat, names, model.config)
    config, flat = mixture.config, mixture.flat
    adapted = {
        name.rpartition(".")[0]
        for name in flat
        if name.endswith((".lora_a", ".lora_b"))
    }
    tensors = mixture.tensors
    for name, array in flat.items():
        module, _, part = name.rpartition(".")
        end = _end(module, part, module in adapted)
        array = np.asarray(array, np.float32)
        array = array.T if part in ("lora_a", "lora_b") else array
        tensors[f"{PREFIX}{names[module]}{end}"] = np.ascontiguousarray(array)
    follows = (
        config.tied and model.lm_head is None and EMBEDDING in config.modules_to_save
    )
    if follows:
        table = tensors[f"{PREFIX}{names[EMBEDDING]}.weight"]
        tensors[f"{PREFIX}{names[HEAD]}.weight"] = table
    modules = {names[name] for name in adapted} - mixture.as_weights
    last = sorted({module.rpartition(".")[2] for module in modules})
    others = {*names.values()} - mixture.whole - mixture.as_weights
    everywhere = {module for module in others if module.rpartition(".")[2] in last}
    saved = [_saved_name(name, names) for name in config.modules_to_save]
    alphas = _patterns(config.alpha_pattern, names) | mixture.alphas
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "rank_pattern": _patterns(config.rank_pattern, names) | mixture.ranks,
        "alpha_pattern": {key: _number(value) for key, value in alphas.items()},
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": last if everywhere == modules else sorted(modules),
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "ensure_weight_tying": follows,
        "trainable_token_indices": _token_indices(config, model),
        "target_parameters": mixture.parameters or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": config.dora,
    }
    folder = None if isinstance(tokenizer, Tokenizer | None) else Path(tokenizer)
    if folder is not None:
        check_copies(folder)
    with new_folder(out, opened_by=CONFIG) as new:
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save(new.path)
        elif folder is not None:
            copy_tokenizer(folder, new.path)
        refuse_another(new)
        new.digests[TENSORS] = write_tensors(new.path / TENSORS, tensors)
        text = json.dumps(settings, indent=2) + "\n"
        (new.path / CONFIG).write_text(text, encoding="utf-8")
    return out


def _end(module: str, part: str, adapted: bool) -> str:
    """Returns the end of a tensor's name in PEFT, of our name of the parameter."""
    if part == "bias":
        return ".base_layer.bias" if adapted else ".bias"
    if part in ("kernel", "weight"):
        return ".weight"
    ends = {ours: end for end, ours in reversed(ENDS)}
    if module == EMBEDDING:
        ends |= {"lora_a": ".lora_embedding_A", "lora_b": ".lora_embedding_B"}
    return ends[part]


def _saved_name(path: str, names: dict[str, str]) -> str:
    """Names a module so that PEFT, which compares ends of names, finds it and no other."""
    if path in (EMBEDDING, HEAD):
        return path
    first = _first(path, names)
    return names[path] if first == path else names[first].rpartition(".")[2]


def _first(path: str, names: Mapping[str, str]) -> str:
    """Returns the numbered name of the first layer (and expert) that has a module."""
    return next(name for name in names if Numbered.parse(name).path == path)


def _token_indices(config: LoRAConfig, model: Decoder) -> Any:
    head = config.tokens if config.head_tokens is None else config.head_tokens
    if model.lm_head is None or not head:
        return list(config.tokens) or None
    return {EMBEDDING: list(config.tokens), HEAD: list(head)}


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _patterns(patterns: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Turns our paths into endings of Hugging Face's names."""
    found = {}
    for path, value in patterns.items():
        name = names[_first(path, names)]
        module = re.sub(r"^model\.layers\.\d+\.", "", name)
        found[re.sub(r"\.experts\.0\.", r".experts.\\d+.", module)] = value
    return found
