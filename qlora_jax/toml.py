"""Settings as TOML: dataclasses written whole, and read back equal.

TOML has no null, so the names of settings that are None stand in a list, `unset`. A file
that does not name a setting leaves it at its default.
"""

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from qlora_jax.errors import ConfigError, gathered
from qlora_jax.files import write_file
from qlora_jax.inputs import read_text
from qlora_jax.schema import shown

T = TypeVar("T")

UNSET = "unset"
_MAX_BYTES = 4 << 20
_MAX_PARTS = 64
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(
    rf"(?<![\w-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{_MAX_PARTS}}}", re.ASCII
)
"""This finds a key with more parts than any setting has, and nothing else that is usual."""

_WHOLE = 2**63
"""What whole numbers are below: an array has room for them."""


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file; settings that it says are unset are None.

    Raises:
      ConfigError: there is no such file, it is not TOML, or `unset` is no list of names.
    """
    try:
        text = read_text(path, limit=_MAX_BYTES, error=ConfigError)
        if _LONG_KEY.search(text):  # whose reading grows with the square of its length
            raise ConfigError(f"{path} has a key of more than {_MAX_PARTS} parts")
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} has a number of more digits than any has") from None
    unset = values.pop(UNSET, [])
    if not isinstance(unset, list) or not all(isinstance(x, str) for x in unset):
        raise ConfigError(
            f"{path}: {UNSET} is {shown(unset)}, expected a list of names"
        )
    for name in unset:
        _set_none(values, name, path)
    return values


def _set_none(values: dict[str, Any], name: str, path: Path) -> None:
    *tables, last = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: {UNSET} names {name!r}, and {table} is no table"
            )
    if last in values:
        raise ConfigError(f"{path}: {name} is set, and {UNSET} names it too")
    values[last] = None


def write_toml(path: Path, config: Any) -> None:
    """Writes a config dataclass, all of it; a kill leaves what was there, or all of this."""
    values = dataclasses.asdict(config)
    unset = list(_nones(values, ""))
    text = tomli_w.dumps({**({UNSET: unset} if unset else {}), **_without_none(values)})
    write_file(path, text)


def _nones(values: dict[str, Any], prefix: str) -> typing.Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _nones(value, f"{prefix}{key}.")
        elif value is None:
            yield prefix + key


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(one) if isinstance(one, dict) else one
        for key, one in value.items()
        if one is not None
    }


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a config dataclass from nested dicts.

    Raises:
      ConfigError: unknown keys or values of a wrong type; all are named.
    """
    problems: list[str] = []
    built = _build(cls, values, "", problems)
    if problems:
        raise ConfigError(gathered(f"{where} cannot be used", problems))
    return built


def _build(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            )
            problems.append(f"{prefix}{key:.80} is no known key{hint}")
        elif dataclasses.is_dataclass(known[key]):
            if isinstance(value, dict):
                kwargs[key] = _build(known[key], value, f"{prefix}{key}.", problems)
            else:
                problems.append(f"{prefix}{key} is {shown(value)}, expected a table")
        elif known[key] == tuple[str, ...] and isinstance(value, str):
            kwargs[key] = (value,)  # one is a list of one
        elif not _fits(value, known[key]):
            problems.append(
                f"{prefix}{key} is {_shown(value)}, expected {_name(known[key])}"
            )
        else:
            kwargs[key] = tuple(value) if isinstance(value, list) else value
    if problems:
        return None
    try:
        return cls(**kwargs)
    except ConfigError as error:
        problems.append(str(error))


def _shown(value: Any) -> str:
    return UNSET if value is None else shown(value)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_fits(v, kind) for v in value)
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(_fits(v, kind) for v in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    if hint is int:
        return type(value) is int and -_WHOLE <= value < _WHOLE
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))
