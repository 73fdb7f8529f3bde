"""PEFT adapter folders: read one onto a model, write one from a model.

`adapter_config.json` has the settings, `adapter_model.safetensors` the factors, whose
names are `base_model.model.MODULE.lora_A.weight` (rank, in), our lora_a.T, and `lora_B`
(out, rank), our lora_b.T. What an adapter of ours cannot hold is refused by name.

Source: peft 0.21.2, tuners/lora/config.py, utils/save_and_load.py and other.py (how
patterns match).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.attach import LoRAConfig, attach_zero, lora_config, split
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.errors import AdapterMismatchError, OutputExistsError, gathered
from qlora_jax.models import FAMILIES, Decoder, DecoderConfig
from qlora_jax.nn import LoRA

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
_HEAD_COPY = "lm_head.base_layer.weight"
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
"""Settings that change what an adapter is -> the values that ours can have."""


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def module_names(config: DecoderConfig) -> dict[str, str]:
    """Returns {our name of a linear, layers and experts numbered: Hugging Face's}."""
    names = {}
    stack = (config.num_layers, config.num_experts)
    for path, template in FAMILIES[config.model_type].NAMES.items():
        if not path.endswith(".kernel"):
            continue
        ours = path.removesuffix(".kernel")
        if template.count("{}"):
            ours = ours.replace("layers.", "layers.{}.", 1)
        if template.count("{}") == 2:
            ours = ours.replace("experts.", "experts.{}.", 1)
        for index in np.ndindex(*stack[: template.count("{}")]):
            names[ours.format(*index)] = template.format(*index).removesuffix(".weight")
    return names


def import_peft(path: str | os.PathLike[str], model: Decoder) -> Decoder:
    """Returns the model with a PEFT adapter attached; the model is left as it was.

    Args:
      path: The folder.
      model: A Decoder, dense or quantized, without adapter.

    Raises:
      AdapterMismatchError: the folder cannot be read, holds something that our adapters
        cannot represent, or does not fit the model; all problems in one message.
    """
    folder = Path(path)
    settings, stored = _read(folder)
    names = {hf: ours for ours, hf in module_names(model.config).items()}
    flat: dict[str, np.ndarray] = {}
    problems = []
    for name, array in stored.items():
        end = next((e for e in _FACTORS if name.endswith(e)), None)
        module = name.removeprefix(_PREFIX).removesuffix(end or "")
        if name == _PREFIX + _HEAD_COPY:
            # PEFT saves the head along with its adapter; it is no part of it.
            if not _is_head(model, array):
                problems.append(f"{name} differs from the model's head")
        elif end is None or not name.startswith(_PREFIX):
            problems.append(f"{name} is neither lora_A nor lora_B of a linear")
        elif module not in names:
            problems.append(f"{name}: the model has no linear {module}")
        else:
            flat[names[module] + _FACTORS[end]] = array.T
    adapted = {name.rpartition(".")[0] for name in flat}
    config, more = _config(settings, adapted, module_names(model.config), flat)
    problems += more
    if problems:
        raise AdapterMismatchError(gathered(f"{folder} cannot be imported", problems))
    model = attach_zero(model, config, key=jax.random.key(0))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, unflatten(flat, lora, str(folder)), rest)


def _is_head(model: Decoder, array: np.ndarray) -> bool:
    head = model.lm_head
    kernel = (head.base if isinstance(head, LoRA) else head or model.head).weight(
        "float32"
    )
    # To the rounding of a 16-bit copy.
    return kernel.shape == array.shape and np.allclose(
        np.asarray(kernel), np.asarray(array, np.float32), rtol=2**-7, atol=1e-6
    )


def export_peft(
    path: str | os.PathLike[str],
    model: Decoder,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the adapter of a model as a PEFT folder.

    An adapter that began as what quantization lost (LoRAConfig.init) is written as it is;
    it belongs to the 4-bit base in PEFT too.

    Args:
      path: The folder.
      model: A Decoder with an adapter.
      base: base_model_name_or_path, which PEFT loads the base from.
      overwrite: Replace an adapter that is there.

    Raises:
      OutputExistsError: the folder has an adapter and overwrite is false, or is a file.
    """
    out = Path(path)
    if out.is_file() or (is_peft(out) and not overwrite):
        raise OutputExistsError(
            f"{out} exists; choose another folder, or pass overwrite to replace it"
        )
    names = module_names(model.config)
    flat = flatten(split(model)[1])
    ends = {ours: theirs for theirs, ours in _FACTORS.items()}
    tensors = {}
    for name, array in flat.items():
        module, _, factor = name.rpartition(".")
        key = f"{_PREFIX}{names[module]}{ends[f'.{factor}']}"
        tensors[key] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    config = lora_config(model)
    adapted = {names[name.rpartition(".")[0]] for name in flat}
    last = sorted({module.rpartition(".")[2] for module in adapted})
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
        "target_modules": last if everywhere == adapted else sorted(adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / TENSORS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return out


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
    return settings, stored


def _config(
    settings: dict[str, Any],
    adapted: set[str],
    names: dict[str, str],
    flat: dict[str, np.ndarray],
) -> tuple[LoRAConfig, list[str]]:
    """Returns the config of the adapted linears, and what it cannot hold."""
    problems = [
        f"{key} is {settings[key]!r}, which an adapter here cannot hold"
        for key, values in _ONLY.items()
        if settings.get(key, values[0]) not in values
    ]
    ranks: dict[str, Counter] = {}
    alphas: dict[str, Counter] = {}
    layers: Counter[str] = Counter()
    whole = Counter(map(_unnumbered, names))
    for name in adapted:
        path, module = _unnumbered(name), names[name]
        layers[path] += 1
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
    for path, count in layers.items():
        if count != whole[path]:
            problems.append(
                f"{path} is adapted in {count} of {whole[path]} layers or experts; here all "
                "of a linear's have adapters"
            )
        for kind, found in (("rank", ranks[path]), ("alpha", alphas[path])):
            if len(found) > 1:
                problems.append(
                    f"{path} has more than one {kind}, {', '.join(map(str, found))}, by "
                    "layer; here all layers of a linear share one"
                )
    if not adapted:
        problems.append("it has no factors of linears")
    if problems:
        return LoRAConfig(), problems
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    each = {
        path: (next(iter(ranks[path])), next(iter(alphas[path]))) for path in layers
    }
    return (
        LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=float(settings.get("lora_dropout") or 0.0),
            rslora=bool(settings.get("use_rslora")),
            targets=",".join(sorted(layers)),
            rank_pattern={p: r for p, (r, _) in sorted(each.items()) if r != rank},
            alpha_pattern={
                p: float(a) for p, (_, a) in sorted(each.items()) if a != alpha
            },
        ),
        [],
    )


def _unnumbered(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _match(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that a module's name ends with, as PEFT matches them."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
