"""The settings of a PEFT folder: which of them an adapter here can have, what they match."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax import matching
from qlora_jax.models.settings import MAX_LAYERS, MAX_ROWS
from qlora_jax.names import EMBEDDING, HEAD
from qlora_jax.schema import (
    FINITE,
    FLAG,
    NULL,
    TEXT,
    Kind,
    either,
    listed,
    mapped,
    misfits,
    number,
    pattern_problem,
    shown,
    whole,
)

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None, "all", "lora_only"),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
"""Settings that change what an adapter is -> the values that ours can have."""
_HELD = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying"),
    "target_parameters",
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
_NAMES = either(NULL, TEXT, listed(TEXT, 100_000))
_TOKENS = listed(whole(0, 2**31 - 1), MAX_ROWS)
_LAYER = whole(0, MAX_LAYERS - 1)
_MAX_KEYS, _MAX_PATTERNS = 20_000, 500
"""Keys that rank_pattern may have, and how many of all settings may be more than names."""
_NAME = re.compile(r"[\w.-]*", re.ASCII)
_RANK = either(whole(0, 2**20), FINITE)

KINDS: dict[str, Kind] = {
    "r": either(NULL, _RANK),
    "lora_alpha": either(NULL, FINITE),
    "lora_dropout": either(NULL, number(0, 1, least=True)),
    "rank_pattern": either(NULL, mapped(_RANK, _MAX_KEYS)),
    "alpha_pattern": either(NULL, mapped(FINITE, _MAX_KEYS)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
    "modules_to_save": either(NULL, listed(TEXT, 200)),
    "target_parameters": either(NULL, listed(TEXT, 20_000)),
    "layers_to_transform": either(NULL, _LAYER, listed(_LAYER, MAX_LAYERS)),
    "trainable_token_indices": either(NULL, _TOKENS, mapped(_TOKENS)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), either(NULL, FLAG)),
    "ensure_weight_tying": either(NULL, FLAG),
    "init_lora_weights": either(NULL, FLAG, TEXT),
    "base_model_name_or_path": either(NULL, TEXT),
    "bias": either(NULL, TEXT),
}
"""Settings -> their kinds. Others are compared with the values that they may have."""

_PATTERNS = (
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("modules_to_save", "layers_pattern"),
)
"""Settings of which PEFT takes a text, the names in a list, or the keys, as patterns."""

_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""init_lora_weights that take a part out of the base's own weights."""


def not_held(settings: Mapping[str, Any]) -> list[str]:
    """Returns what is said of settings that make an adapter another than ours can be."""
    problems = [
        f"{key} is {shown(settings[key])}, which an adapter here cannot hold"
        for key, values in _ONLY.items()
        if settings.get(key, values[0]) not in values
    ]
    if settings.get("lora_bias"):
        problems.append(
            f"lora_bias is {shown(settings['lora_bias'])}: lora_B has biases, and an adapter "
            "here has factors without; train it in PEFT with bias='lora_only' instead, which "
            "trains the biases that the base has"
        )
    wrong = misfits(settings, KINDS)
    problems += wrong + _unreadable(settings, {*settings} & {*_PATTERNS})
    known = {*_ONLY, *_HELD, *_ASIDE}
    problems += [
        f"{key:.80} is {shown(value)}, a setting that is not known here"
        for key, value in settings.items()
        if value and key not in known
    ]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        problems.append(
            f"init_lora_weights is {shown(start)}, which changed the base's weights; save it "
            "in PEFT with path_initial_model_for_weight_conversion"
        )
    return problems


def _unreadable(settings: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns what is said of patterns that cannot be matched, in settings of their kind."""
    patterns: list[str] = []
    for key in sorted(keys):
        value = settings[key]
        if isinstance(value, str):  # which is matched as it is
            patterns.append(value)
        elif KINDS[key].fits(value):
            others = (name for name in value or () if not _NAME.fullmatch(name))
            patterns += [f"({name})" for name in others]
    if len(patterns) > _MAX_PATTERNS:
        return [f"it has {len(patterns)} patterns, expected at most {_MAX_PATTERNS}"]
    return [
        f"{pattern!r:.80} is no pattern: {problem}"
        for pattern in patterns
        if (problem := pattern_problem(pattern))
    ]


def targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT's settings put an adapter on a module of Hugging Face's name."""
    targets = settings.get("target_modules")
    if targets is None or _names(settings.get("exclude_modules"), module):
        return False
    saved = settings.get("modules_to_save") or ()
    if any(matching.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    if targets == "all-linear":
        return not module.endswith((HEAD, EMBEDDING))
    if not _names(targets, module):
        return False
    return isinstance(targets, str) or _in_layers(settings, module)


def _names(wanted: Any, module: str) -> bool:
    if isinstance(wanted, str):
        return matching.fullmatch(wanted, module) is not None
    names = _set_of(tuple(wanted or ()))
    ends = [i + 1 for i, letter in enumerate(module) if letter == "."]
    return any(module[i:] in names for i in (0, *ends))


_set_of = functools.lru_cache(maxsize=8)(frozenset)


def _in_layers(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a module is in the layers that layers_to_transform names, if it does."""
    layers = settings.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = settings.get("layers_pattern") or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        # The number is the last group; the pattern may have others.
        if found := matching.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            numbers = (layers,) if isinstance(layers, int) else layers
            return found[-1] is not None and int(found[-1]) in numbers
    return False


def saved_modules(
    settings: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, list[str]]:
    """Returns {name in modules_to_save: the modules that PEFT finds by it}.

    It compares ends of names, whole parts or not, and what is inside of a module that is
    found (`mlp`) trains with it.
    """
    modules = list(modules)
    found: dict[str, list[str]] = {}
    for end in settings.get("modules_to_save") or ():
        found[end] = [
            module
            for module in modules
            if any(part.endswith(end) for part in _within(module))
        ]
    return found


def _within(module: str) -> list[str]:
    """Returns a module's name and those of the modules that it lies in."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def token_indices(
    settings: Mapping[str, Any],
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Returns the trained tokens of the embedding, and of the head if said apart."""
    indices = settings.get("trainable_token_indices") or ()
    if not isinstance(indices, dict):
        return tuple(indices), () if indices else None
    by_end = {name.rpartition(".")[2]: tuple(ids) for name, ids in indices.items()}
    return by_end.get(EMBEDDING, ()), by_end.get(HEAD, ())


def matched(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that a module's name ends with, as PEFT matches them."""
    for key, value in (patterns or {}).items():
        if _NAME.fullmatch(key):
            found = _ends_with(module, key)
        else:
            found = matching.match(rf"(.*\.)?({key})$", module) is not None
        if found:
            return value
    return default


def _ends_with(module: str, name: str) -> bool:
    """Whether a name matches the last parts of a module's, where a dot is any letter."""
    start = len(module) - len(name)
    if start < 0 or (start and module[start - 1] != "."):
        return False
    return all(x in (y, ".") for x, y in zip(name, module[start:], strict=True))
