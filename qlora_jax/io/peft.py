"""PEFT adapter folders: read one onto a model, write one from a model.

`adapter_config.json` has the settings, `adapter_model.safetensors` the tensors, named
`base_model.model.MODULE` and one of these ends (ours beside it, transposed where marked):

    .lora_A.weight (rank, in)               lora_a, transposed
    .lora_B.weight (out, rank)              lora_b, transposed
    .lora_magnitude_vector (out,)           magnitude, of DoRA
    .lora_embedding_A (rank, vocab)         lora_a of the embedding, transposed
    .lora_embedding_B (hidden, rank)        lora_b, transposed
    .token_adapter.trainable_tokens_delta   rows: the tokens' new rows, no difference
    .bias, .base_layer.bias                 bias, of a plain and of an adapted linear
    .weight                                 a module that trained in full

With a grown vocabulary PEFT saves embedding and head too, some of them twice. What an
adapter of ours cannot hold is refused by name.

Source: peft 0.21.2, tuners/lora/config.py, utils/save_and_load.py and other.py (how
patterns match).
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.attach import attach_zero, lora_config, split
from qlora_jax.adapters.names import dotted, flatten, unflatten
from qlora_jax.config.lora import EMBEDDING, HEAD, Bias, LoRAConfig
from qlora_jax.errors import (
    AdapterMismatchError,
    ConfigError,
    OutputExistsError,
    gathered,
)
from qlora_jax.models import FAMILIES, Decoder, DecoderConfig
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.nn.lora import adapter_scale
from qlora_jax.quant import Quantized

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = (
    (".lora_A.weight", "lora_a"),
    (".lora_B.weight", "lora_b"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_embedding_A", "lora_a"),
    (".lora_embedding_B", "lora_b"),
    (".token_adapter.trainable_tokens_delta", "rows"),
    (".base_layer.bias", "bias"),
    (".bias", "bias"),
    (".token_adapter.base_layer.weight", "copy"),
    (".base_layer.weight", "copy"),
    (".original_module.weight", "copy"),
    (".modules_to_save.weight", "own"),
    (".weight", "own"),
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None, "all", "lora_only"),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
"""Settings that change what an adapter is -> the values that ours can have."""
_HELD = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "init_lora_weights"),
)
_ASIDE = (
    *(
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "auto_mapping",
    ),
    *("peft_version", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Settings that ours hold, and those that say nothing of a trained adapter."""
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""init_lora_weights that take a part out of the base's own weights."""


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def module_names(config: DecoderConfig) -> dict[str, str]:
    """Returns {our path of a module, layers and experts numbered: Hugging Face's}."""
    names = {}
    stack = (config.num_layers, config.num_experts)
    for path, template in FAMILIES[config.model_type].NAMES.items():
        ours = path.rpartition(".")[0]
        if template.count("{}"):
            ours = ours.replace("layers.", "layers.{}.", 1)
        if template.count("{}") == 2:
            ours = ours.replace("experts.", "experts.{}.", 1)
        for index in np.ndindex(*stack[: template.count("{}")]):
            names[ours.format(*index)] = template.format(*index).rpartition(".")[0]
    return names


def import_peft(path: str | os.PathLike[str], model: Decoder) -> Decoder:
    """Returns the model with a PEFT adapter attached; the model is left as it was.

    Args:
      path: The folder.
      model: A Decoder, dense or quantized, without adapter. Its vocabulary grows where
        the adapter's is larger.

    Raises:
      AdapterMismatchError: the folder cannot be read, holds something that our adapters
        cannot represent, or does not fit the model; all problems in one message.
    """
    folder = Path(path)
    flat, config, rows, problems = _understood(folder, model)
    if problems:
        raise AdapterMismatchError(gathered(f"{folder} cannot be imported", problems))
    try:
        model = resize_tokens(model, rows)
        model = attach_zero(model, config, key=jax.random.key(0))
    except ConfigError as error:
        raise AdapterMismatchError(f"{folder} cannot be imported: {error}") from None
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, unflatten(flat, lora, str(folder)), rest)


def describe_peft(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what a PEFT folder is."""
    settings, stored = _read(Path(path))
    shown = (
        *(
            "base_model_name_or_path",
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
        ),
        *("use_rslora", "use_dora", "bias", "modules_to_save", "rank_pattern"),
        *("alpha_pattern", "layers_to_transform", "trainable_token_indices"),
    )
    return {
        "kind": "PEFT adapter",
        **{key: settings[key] for key in shown if settings.get(key)},
        "parameters": sum(array.size for array in stored.values()),
        "arrays": len(stored),
    }


def peft_misfits(path: str | os.PathLike[str], model: Decoder) -> list[str]:
    """Returns why a PEFT adapter does not fit a base, whose kernels may be shapes alone."""
    flat, config, rows, problems = _understood(Path(path), model)
    if problems:
        return problems
    graphdef, state = nnx.split(model)

    def attached(state: nnx.State) -> nnx.State:
        base = resize_tokens(nnx.merge(graphdef, state), rows)
        model = attach_zero(base, config, key=jax.random.key(0))
        return unflatten(flat, nnx.state(model, nnx.LoRAParam))

    try:
        nnx.eval_shape(attached, state)
    except (AdapterMismatchError, ConfigError) as error:
        return [str(error)]
    return []


def _understood(
    folder: Path, model: Decoder
) -> tuple[dict[str, np.ndarray], LoRAConfig, int, list[str]]:
    """Returns (arrays by our names, config, rows that the vocabulary needs, problems)."""
    settings, stored = _read(folder)
    problems = _not_held(settings)
    flat, copies, more = _named(stored, model)
    problems += more
    problems += _without_tensors(settings, flat, model)
    tokens, head_tokens = _tokens(settings)
    problems += _not_copies(copies, model, settings, flat, {*tokens})
    rows = [len(flat[name]) for name in _TABLES if name in flat]
    rows += [i + 1 for i in (*tokens, *(head_tokens or ()))]
    config, more = _config(settings, flat, model, tokens, head_tokens)
    return flat, config, max(rows, default=0), problems + more


def _not_held(settings: dict[str, Any]) -> list[str]:
    """Returns what is said of settings that make an adapter another than ours can be."""
    problems = [
        f"{key} is {settings[key]!r}, which an adapter here cannot hold"
        for key, values in _ONLY.items()
        if settings.get(key, values[0]) not in values
    ]
    known = {*_ONLY, *_HELD, *_ASIDE}
    problems += [
        f"{key} is {value!r}, a setting that is not known here"
        for key, value in settings.items()
        if value and key not in known
    ]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        problems.append(
            f"init_lora_weights is {start!r}, which changed the base's weights; save it in "
            "PEFT with path_initial_model_for_weight_conversion"
        )
    return problems


def _without_tensors(
    settings: dict[str, Any], flat: dict[str, np.ndarray], model: Decoder
) -> list[str]:
    """Returns modules that the settings name and the file has nothing of.

    PEFT loads such a folder with a warning and leaves them untrained.
    """
    names = module_names(model.config)
    have = {dotted(path) for path, _ in nnx.to_flat_state(nnx.state(model))}
    linears = {
        name
        for name in names
        if name == EMBEDDING or f"{_unnumbered(name)}.kernel" in have
    }
    saved = settings.get("modules_to_save") or []
    saved_here = {
        ours for ours, hf in names.items() if any(hf.endswith(end) for end in saved)
    }
    adapted = {name.rpartition(".")[0] for name in flat}
    missing = [
        names[name]
        for name in sorted(linears - saved_here - adapted)
        if _targeted(settings, names[name])
    ]
    missing += [
        end
        for end in saved
        if not any(names[name].endswith(end) for name in saved_here & adapted)
    ]
    if not missing:
        return []
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return [
        f"{CONFIG} names {', '.join(missing[:3])}{more}, of which {TENSORS} has nothing"
    ]


def _targeted(settings: dict[str, Any], module: str) -> bool:
    """Whether PEFT's settings put an adapter on a module of Hugging Face's name."""

    def named(wanted: Any) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == one or module.endswith(f".{one}") for one in wanted or ())

    targets = settings.get("target_modules")
    if targets is None or named(settings.get("exclude_modules")):
        return False
    if targets == "all-linear":
        return not module.endswith((HEAD, EMBEDDING))
    layers = settings.get("layers_to_transform")
    if layers is not None and (number := re.search(r"\.(\d+)\.", module)):
        layers = [layers] if isinstance(layers, int) else layers
        if int(number.group(1)) not in layers:
            return False
    return named(targets)


_TABLES = (f"{EMBEDDING}.weight", f"{EMBEDDING}.lora_a", f"{HEAD}.kernel")
"""Parameters with a row a token."""


def _named(
    stored: dict[str, np.ndarray], model: Decoder
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Returns ({our name: array as ours is}, {our module: copy of its weight}, problems)."""
    names = {hf: ours for ours, hf in module_names(model.config).items()}
    known = FAMILIES[model.config.model_type].NAMES
    flat, copies, problems = {}, {}, []
    for name, array in stored.items():
        end, ours = next(((e, o) for e, o in _ENDS if name.endswith(e)), (None, ""))
        module = name.removeprefix(_PREFIX).removesuffix(end or "")
        if end is None or not name.startswith(_PREFIX):
            problems.append(f"{name} is no tensor of an adapter")
        elif module not in names:
            problems.append(f"{name}: the model has no module {module}")
        elif not np.isfinite(np.asarray(array, np.float32)).all():
            problems.append(f"{name} has NaN or Inf values")
        elif ours == "copy":
            copies[names[module]] = array
        elif ours == "own":
            kernel = f"{_unnumbered(names[module])}.kernel" in known
            key = f"{names[module]}.{'kernel' if kernel else 'weight'}"
            if not np.array_equal(flat.setdefault(key, array), array):
                problems.append(f"{name} is there twice, with different values")
        else:
            turned = array.T if ours in ("lora_a", "lora_b") else array
            flat[f"{names[module]}.{ours}"] = turned
    return flat, copies, problems


def _tokens(
    settings: dict[str, Any],
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Returns the trained tokens of the embedding, and of the head if said apart."""
    indices = settings.get("trainable_token_indices") or ()
    if not isinstance(indices, dict):
        return tuple(indices), () if indices else None
    by_end = {name.rpartition(".")[2]: tuple(ids) for name, ids in indices.items()}
    return by_end.get(EMBEDDING, ()), by_end.get(HEAD, ())


def _not_copies(
    copies: dict[str, np.ndarray],
    model: Decoder,
    settings: dict[str, Any],
    flat: dict[str, np.ndarray],
    tokens: set[int],
) -> list[str]:
    """Takes what PEFT saves along with an adapter, and is no part of it, out of `flat`.

    That is copies of embedding and head, where an adapter is on them or the vocabulary has
    grown, and the head of a tied embedding that trains. Returns what differs.
    """
    saved = {name.rpartition(".")[2] for name in settings.get("modules_to_save") or ()}
    head, table = f"{HEAD}.kernel", f"{EMBEDDING}.weight"
    for theirs, mine, follows in (
        (head, table, settings.get("ensure_weight_tying")),
        (f"{HEAD}.rows", f"{EMBEDDING}.rows", True),
    ):
        if follows and model.lm_head is None and theirs in flat and mine in flat:
            if np.array_equal(flat[theirs], flat[mine]):
                del flat[theirs]
    for name, part in ((HEAD, head), (EMBEDDING, table)):
        if part in flat and name not in saved:
            # Of a vocabulary that has grown: the new rows are nowhere else.
            if len(flat[part]) == model.config.vocab_size or tokens:
                copies[name] = flat.pop(part)
    problems = []
    for name, array in copies.items():
        ours = _own_weight(model, name)
        if isinstance(ours, jax.ShapeDtypeStruct):
            continue
        if ours is None:
            problems.append(f"a copy of {name} is no part of an adapter")
            continue
        whole = f"{name}.kernel" in flat or f"{name}.weight" in flat
        new = set() if whole else set(range(len(ours), len(array)))
        # To the rounding of a 16-bit copy.
        same = array.shape[1:] == ours.shape[1:] and np.allclose(
            ours, np.asarray(array[: len(ours)], np.float32), rtol=2**-7, atol=1e-6
        )
        if not same or new - tokens:
            problems.append(f"{name} differs from the model's")
    return problems


def _own_weight(model: Decoder, name: str) -> Any:
    """Returns the model's own table, or its shape where there is no more of it."""
    if name not in (EMBEDDING, HEAD):
        return None
    if name == HEAD and model.lm_head is not None:
        table = model.lm_head.kernel.get_value()
    else:
        table = model.embed_tokens.weight.get_value()
    if isinstance(table, Quantized):  # further from a copy than its rounding
        return jax.ShapeDtypeStruct(table.shape, "float32")
    return table if isinstance(table, jax.ShapeDtypeStruct) else np.asarray(table, "f4")


def export_peft(
    path: str | os.PathLike[str],
    model: Decoder,
    *,
    base: str | None = None,
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
      base: base_model_name_or_path, which PEFT loads the base from; needed for 'pissa'.
      overwrite: Replace an adapter that is there.

    Raises:
      OutputExistsError: the folder has an adapter and overwrite is false, or is a file.
      AdapterMismatchError: an adapter of experts that PEFT cannot hold, see
        `_for_fused_experts`.
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
    if any(".experts." in name for name in flat):
        config, flat = _for_fused_experts(config, flat)
    adapted = {
        name.rpartition(".")[0]
        for name in flat
        if name.endswith((".lora_a", ".lora_b"))
    }
    tensors = {}
    for name, array in flat.items():
        module, _, part = name.rpartition(".")
        end = _end(module, part, module in adapted)
        array = np.asarray(array, np.float32)
        array = array.T if part in ("lora_a", "lora_b") else array
        tensors[f"{_PREFIX}{names[module]}{end}"] = np.ascontiguousarray(array)
    follows = config.tied and model.lm_head is None and EMBEDDING in config.saved
    if follows:
        table = tensors[f"{_PREFIX}{names[EMBEDDING]}.weight"]
        tensors[f"{_PREFIX}{names[HEAD]}.weight"] = table
    modules = {names[name] for name in adapted}
    last = sorted({module.rpartition(".")[2] for module in modules})
    everywhere = {m for m in names.values() if m.rpartition(".")[2] in last}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "rank_pattern": _patterns(config.rank_pattern, names),
        "alpha_pattern": {
            key: _number(value)
            for key, value in _patterns(config.alpha_pattern, names).items()
        },
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": last if everywhere == modules else sorted(modules),
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": [_saved_name(name, names) for name in config.saved] or None,
        "ensure_weight_tying": follows,
        "trainable_token_indices": _token_indices(config, model),
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": config.dora,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / TENSORS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return out


def _for_fused_experts(
    config: LoRAConfig, flat: dict[str, np.ndarray]
) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """Returns an adapter of experts with one rank and alpha for all, which says the same.

    transformers 5 holds a layer's experts as two parameters, and PEFT 0.21 turns adapters of
    single experts into its own for these, doubling rank and alpha of gate and up: rsLoRA
    comes out too strong, patterns of experts are ignored, dropout is refused. So scales go
    into lora_b, smaller ranks are padded with zeros, and dropout, which only training has,
    is left out.

    Raises:
      AdapterMismatchError: DoRA, or gate_proj or up_proj of experts alone.
    """
    problems = []
    if config.dora:
        problems.append("DoRA: PEFT has none for experts")
    parts = {name.split(".")[-2] for name in flat if ".experts." in name}
    if len(parts & {"gate_proj", "up_proj"}) == 1:
        problems.append(
            f"{', '.join(sorted(parts))} of experts: PEFT needs gate_proj and up_proj together"
        )
    if problems:
        raise AdapterMismatchError(
            gathered("this adapter of experts has no form in PEFT", problems)
        )
    if not (config.rslora or config.rank_pattern or config.alpha_pattern):
        return dataclasses.replace(config, dropout=0.0), flat
    rank = max([config.rank, *config.rank_pattern.values()])
    made = {}
    for name, array in flat.items():
        path, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b"):
            own, alpha = config.shape_of(_unnumbered(path))
            spare = (
                [(0, 0), (0, rank - own)]
                if part == "lora_a"
                else [(0, rank - own), (0, 0)]
            )
            array = np.pad(array, spare)
            if part == "lora_b":
                scale = adapter_scale(own, alpha, config.rslora)
                array = array * np.float32(scale * rank / config.alpha)
        made[name] = array
    plain = {"rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "dropout": 0.0}
    return dataclasses.replace(config, rank=rank, **plain), made


def _end(module: str, part: str, adapted: bool) -> str:
    """Returns the end of a tensor's name in PEFT, of our name of the parameter."""
    if part == "bias":
        return ".base_layer.bias" if adapted else ".bias"
    if part in ("kernel", "weight"):
        return ".weight"
    ends = {ours: end for end, ours in reversed(_ENDS)}
    if module == EMBEDDING:
        ends |= {"lora_a": ".lora_embedding_A", "lora_b": ".lora_embedding_B"}
    return ends[part]


def _saved_name(path: str, names: dict[str, str]) -> str:
    """Names a module so that PEFT, which compares ends of names, finds it and no other."""
    if path.startswith("layers."):
        return names[path.replace("layers.", "layers.0.", 1)].rpartition(".")[2]
    return path if path in (EMBEDDING, HEAD) else names[path]


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
        ours = path.replace("layers.", "layers.0.", 1).replace("experts.", "experts.0.")
        module = re.sub(r"^model\.layers\.0\.", "", names[ours])
        found[re.sub(r"\.experts\.0\.", r".experts.\\d+.", module)] = value
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if (folder / "adapter_model.bin").exists() and not (folder / TENSORS).exists():
        raise AdapterMismatchError(
            f"{folder} has adapter_model.bin, a pickle; save it again in PEFT with "
            "safe_serialization=True"
        )
    try:
        settings = json.loads((folder / CONFIG).read_text())
        stored = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterMismatchError(
            f"{folder} cannot be read as a PEFT adapter: {error}"
        ) from None
    if not isinstance(settings, dict):
        raise AdapterMismatchError(f"{folder / CONFIG} is no JSON object")
    given = {key: value for key, value in settings.items() if value is not None}
    return {"r": 8, "lora_alpha": 8} | given, stored  # PEFT's defaults


def _config(
    settings: dict[str, Any],
    flat: dict[str, np.ndarray],
    model: Decoder,
    tokens: tuple[int, ...],
    head_tokens: tuple[int, ...] | None,
) -> tuple[LoRAConfig, list[str]]:
    """Returns the config of what is adapted and trained, and what it cannot hold."""
    names, problems = module_names(model.config), []
    adapted = {
        name.rpartition(".")[0]
        for name in flat
        if name.endswith((".lora_a", ".lora_b"))
    }
    owned = {
        _unnumbered(name.rpartition(".")[0])
        for name in flat
        if name.endswith((".kernel", ".weight"))
    }
    ranks: dict[str, Counter] = {}
    alphas: dict[str, Counter] = {}
    numbered: dict[str, set[str]] = {}
    for name in adapted:
        path, module = _unnumbered(name), names[name]
        numbered.setdefault(path, set()).add(name)
        alpha = _match(
            settings.get("alpha_pattern"), module, settings.get("lora_alpha")
        )
        rank = _match(settings.get("rank_pattern"), module, settings.get("r"))
        ranks.setdefault(path, Counter())[rank] += 1
        alphas.setdefault(path, Counter())[alpha] += 1
        for factor, axis in (("lora_a", 1), ("lora_b", 0)):
            array = flat.get(f"{name}.{factor}")
            if array is None:
                problems.append(f"{module} has no tensor for {factor}")
            elif array.shape[axis] != rank:
                problems.append(
                    f"{module}: {factor} has rank {array.shape[axis]}, {CONFIG} says {rank}"
                )
    layers = _layers(numbered, names, problems)
    for path in numbered:
        for kind, found in (("rank", ranks[path]), ("alpha", alphas[path])):
            if len(found) > 1:
                problems.append(
                    f"{path} has more than one {kind}, {', '.join(map(str, found))}, by "
                    "layer; here all layers of a linear share one"
                )
    if not (adapted or owned or tokens):
        problems.append("it has no factors of linears")
    if problems:
        return LoRAConfig(), problems
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    each = {
        path: (next(iter(ranks[path])), next(iter(alphas[path]))) for path in numbered
    }
    # PEFT's tied head stays as it was when the embedding trains, unless told otherwise.
    bias = settings.get("bias")
    own_head = EMBEDDING in owned and not settings.get("ensure_weight_tying")
    try:
        config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=float(settings.get("lora_dropout") or 0.0),
            rslora=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
            bias=cast(Bias, bias if bias in get_args(Bias) else "none"),
            layers=layers,
            modules_to_save=",".join(sorted(owned)),
            tied=not own_head,
            tokens=tokens,
            head_tokens=None if model.lm_head is None else head_tokens,
            targets=",".join(sorted(numbered)),
            rank_pattern={p: r for p, (r, _) in sorted(each.items()) if r != rank},
            alpha_pattern={
                p: float(a) for p, (_, a) in sorted(each.items()) if a != alpha
            },
        )
    except ConfigError as error:
        return LoRAConfig(), [str(error)]
    return config, []


def _layers(
    numbered: dict[str, set[str]], names: dict[str, str], problems: list[str]
) -> tuple[int, ...]:
    """Returns the adapted layers, () for all; they must be the same of every linear."""
    chosen: dict[tuple[int, ...], list[str]] = {}
    for path, found in numbered.items():
        if not path.startswith("layers."):
            continue
        layers = {int(name.split(".")[1]) for name in found}
        whole = [name for name in names if _unnumbered(name) == path]
        wanted = {name for name in whole if int(name.split(".")[1]) in layers}
        if found != wanted:
            problems.append(
                f"{path} is adapted in {len(found)} of {len(wanted)} experts; here all of a "
                "layer's have adapters"
            )
        count = len({name.split(".")[1] for name in whole})
        key = () if len(layers) == count else tuple(sorted(layers))
        chosen.setdefault(key, []).append(path)
    if len(chosen) > 1:
        said = "; ".join(
            f"{', '.join(paths)} in {'all' if not key else list(key)}"
            for key, paths in chosen.items()
        )
        problems.append(
            f"linears are adapted in different layers ({said}); here all in the same"
        )
    return next(iter(chosen), ())


def _unnumbered(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _match(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that a module's name ends with, as PEFT matches them."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
