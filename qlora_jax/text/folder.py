"""The files of a tokenizer's folder, read as transformers' fast tokenizer reads them.

tokenizer.json holds the vocabulary and how text is cut. Beside it, in this order:

- tokenizer_config.json: special tokens, `added_tokens_decoder`, templates.
- special_tokens_map.json and added_tokens.json, which count only where the config has no
  `added_tokens_decoder`.
- chat_template.jinja and additional_chat_templates/*.jinja, which replace the config's.
- generation_config.json, else config.json, for the ids that end a text.

`add_bos_token` and `add_eos_token` say nothing where there is a tokenizer.json: its
post-processor decides.

Source: transformers 5.24, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py (TokenizersBackend.__init__).
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from qlora_jax.errors import CheckpointError, OutputExistsError, gathered
from qlora_jax.files import NewFolder
from qlora_jax.inputs import read_bytes, read_json, read_text
from qlora_jax.schema import (
    FLAG,
    NULL,
    TEXT,
    Kind,
    either,
    listed,
    mapped,
    misfits,
    shaped,
    whole,
)
from qlora_jax.text import bounded, convert

logger = logging.getLogger(__name__)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
"""What belongs to a tokenizer in a model folder; copied along with a model."""

TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates, a file NAME.jinja each."""

DEFAULT = "default"
"""The name of the template that counts unless another is chosen."""

_AS_JSON_SAYS = ("mistral", "mixtral", "phi3", "granite", "olmo2", "qwen2")
"""Model types of which tokenizer.json counts, though the config names LlamaTokenizer."""


_MAX_TOKENIZER_BYTES, _MAX_IDS = 128 << 20, 2**24
ID = whole(0, 2**31 - 1)
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_TOKEN = either(
    TEXT, shaped({"content": TEXT, **dict.fromkeys(_FLAGS, FLAG)}, ("content",))
)
_TEMPLATE = shaped({"name": TEXT, "template": TEXT}, ("name", "template"))
_EXTRA = either(NULL, listed(_TOKEN), mapped(_TOKEN))
_SETTINGS: dict[str, Kind] = {
    "added_tokens_decoder": either(NULL, mapped(_TOKEN)),
    "extra_special_tokens": _EXTRA,
    "additional_special_tokens": _EXTRA,
    "chat_template": either(NULL, TEXT, listed(_TEMPLATE), mapped(TEXT)),
    "tokenizer_class": either(NULL, TEXT),
    **dict.fromkeys(("split_special_tokens", "legacy"), either(NULL, FLAG)),
    "add_prefix_space": either(NULL, FLAG),
}
"""Fields of tokenizer_config.json and special_tokens_map.json -> their kinds."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
"""Fields that hold a token. Others that end so may hold it too, or say anything else."""

_IDS: dict[str, Kind] = {
    "bos_token_id": either(NULL, ID),
    "eos_token_id": either(NULL, ID, listed(ID, 1000)),
}
"""Fields of generation_config.json and config.json -> their kinds."""


class Parts(NamedTuple):
    """What a folder says of its tokenizer.

    Attributes:
      tokenizer: The tokenizer, with every token that any of the files declares.
      special_tokens: Name ("bos_token") -> text, as chat templates get them.
      bos_id: Id of the BOS; None where there is none.
      eos_ids: Ids that end a text, the tokenizer's first.
      templates: Name -> chat template.
    """

    tokenizer: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    templates: dict[str, str]


def check_copies(folder: Path) -> None:
    """Refuses to copy a tokenizer whose files are links to other places.

    A link may lead to a file in the folder, or in the cache of the hub's repository that the
    folder is of.

    Raises:
      CheckpointError: others do; all are named.
    """
    inside = folder.resolve()
    if inside.parent.name == "snapshots":  # of a hub cache, whose files lie in blobs/
        inside = inside.parents[1]
    elsewhere = [
        f"{name} is a link to {(folder / name).resolve()}"
        for name in _to_copy(folder)
        if not (folder / name).resolve().is_relative_to(inside)
    ]
    if elsewhere:
        raise CheckpointError(
            gathered(
                f"{folder} has a tokenizer's files that lie outside of it, and are not copied "
                "from there; put the files themselves into the folder",
                elsewhere,
            )
        )


def _to_copy(folder: Path) -> list[str]:
    """Returns the files of a folder's tokenizer and chat templates, as relative paths."""
    names = [name for name in FILES if (folder / name).is_file()]
    files = folder.glob(f"{TEMPLATES}/*.jinja")
    return names + [f"{TEMPLATES}/{file.name}" for file in files if file.is_file()]


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copies a folder's tokenizer and chat templates as they are, see `check_copies`."""
    for name in _to_copy(folder):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def refuse_another(new: NewFolder) -> None:
    """Refuses an old folder that keeps a tokenizer's files which the new one has none of.

    They would be read as the new model's.

    Raises:
      OutputExistsError: there are such files, which no writer of ours put there.
    """
    others = [
        name for name in new.kept() if name in FILES or name.startswith(f"{TEMPLATES}/")
    ]
    if others:
        raise OutputExistsError(
            f"{new.out} has {', '.join(others)} of another model, which would be read as this "
            "one's; move them away, or choose another folder"
        )


def read_folder(folder: Path) -> Parts | None:
    """Reads a folder; None where it has no tokenizer.

    Raises:
      CheckpointError: a file is there and cannot be read, or needs a converter that is
        not installed.
    """
    path, named = folder / "tokenizer.json", {}
    own = os.path.lexists(path)
    if own:
        made = _open_tokenizer(path)
    elif source := convert.source_of(folder):
        made, named = convert.convert(source)
    else:
        return None
    settings, added = _settings(folder)
    model = read_json(folder / "config.json", optional=True)
    if isinstance(inner := model.get("text_config"), dict):  # of a multimodal model
        model = inner | model
    _check(folder / "config.json", misfits(model, _IDS))
    if own:
        made = _as_its_class(made, settings, model.get("model_type"))
    special = named | _special_tokens(settings)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    _add_tokens(made, settings, added, special, folder)
    ids = {key: made.token_to_id(text) for key, text in special.items()}
    where = folder / "generation_config.json"
    generation = read_json(where, optional=True)
    _check(where, misfits(generation, _IDS))
    stored = generation.get("eos_token_id", model.get("eos_token_id"))
    ends = [ids.get("eos_token"), *(stored if isinstance(stored, list) else [stored])]
    bos = ids.get("bos_token")
    # A tokenizer_config that says null means it: such models (Qwen2) use no BOS.
    if bos is None and "bos_token" not in settings:
        bos = model.get("bos_token_id")
    return Parts(
        made,
        special,
        bos,
        tuple(dict.fromkeys(i for i in ends if i is not None)),
        _templates(folder, settings),
    )


def _settings(
    folder: Path,
) -> tuple[dict[str, Any], dict[int, tokenizers.AddedToken]]:
    """Returns tokenizer_config.json, completed, and the tokens that the files add."""
    settings = _read_settings(folder / "tokenizer_config.json")
    declared = settings.get("added_tokens_decoder")
    if declared is not None:
        return settings, {int(i): _added(t) for i, t in declared.items()}
    settings |= _read_settings(folder / "special_tokens_map.json")
    special = {_text(v) for k, v in settings.items() if k.endswith("_token")}
    special.update(_text(t) for t in _extra(settings))
    added = read_json(path := folder / "added_tokens.json", optional=True)
    _check(path, misfits(added, dict.fromkeys(added, ID)))
    return settings, {
        i: tokenizers.AddedToken(
            text, special=text in special, normalized=text not in special
        )
        for text, i in added.items()
    }


def _read_settings(path: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json or special_tokens_map.json; {} where there is no file."""
    settings = read_json(path, optional=True)
    tokens = {
        name: either(NULL, _TOKEN)
        for name, value in settings.items()
        if name in _ROLES or (name.endswith("_token") and _text(value) is not None)
    }
    problems = misfits(settings, tokens | _SETTINGS)
    ids = settings.get("added_tokens_decoder")
    for name in ids if isinstance(ids, dict) else ():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            problems.append(f"added_tokens_decoder has {name[:40]!r}, which is no id")
    _check(path, problems)
    return settings


def _check(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(gathered(f"{path} cannot be used", problems))


def _open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    data = read_bytes(path, limit=_MAX_TOKENIZER_BYTES)
    bounded.check_patterns(data, path)
    try:
        with bounded.no_panic():
            made = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}") from None
    largest = max(made.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= _MAX_IDS:  # the package makes room for each that is less
        raise CheckpointError(
            f"{path} has the id {largest}, expected at most {_MAX_IDS}"
        )
    return made


def _text(value: Any) -> str | None:
    """Returns the text of a token, which is a string or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _added(value: Any) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value)
    flags = {name: value[name] for name in _FLAGS if name in value}
    return tokenizers.AddedToken(value["content"], **flags)


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Returns the special tokens that have no role of their own."""
    extra = settings.get("extra_special_tokens") or settings.get(
        "additional_special_tokens"
    )
    return list(extra.values()) if isinstance(extra, dict) else list(extra or ())


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> text of the special tokens."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    if isinstance(extra := settings.get("extra_special_tokens"), dict):
        named |= extra
    return {
        key: text for key, value in named.items() if (text := _text(value)) is not None
    }


def _add_tokens(
    made: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    added: Mapping[int, tokenizers.AddedToken],
    special: Mapping[str, str],
    folder: Path,
) -> None:
    """Adds to a tokenizer what the files beside it declare."""
    had = {repr(token) for token in made.get_added_tokens_decoder().values()}
    roles = set(special.values())
    lacking = [t for _, t in sorted(added.items()) if repr(t) not in had]
    for token in lacking:
        if token.content in roles:
            token.special = True
    # All at once: each call works on all tokens that there are.
    made.add_tokens(lacking)
    known = {token.content for token in made.get_added_tokens_decoder().values()}
    others = []
    for key, text in special.items():
        value = settings.get(key)
        if text and text not in known:
            others.append(_added(value if isinstance(value, dict) else text))
    others += [_added(one) for one in _extra(settings) if _text(one) not in known]
    for token in others:
        token.special = True
    made.add_tokens(others)
    moved = [
        f"{token.content!r} {made.token_to_id(token.content)} instead of {i}"
        for i, token in sorted(added.items())
        if made.token_to_id(token.content) != i
    ]
    if moved:
        logger.warning(
            "%s: %d added tokens have other ids than its files say, as in transformers: %s",
            folder,
            len(moved),
            ", ".join(moved[:5]),
        )


def _as_its_class(
    made: tokenizers.Tokenizer, settings: Mapping[str, Any], model_type: Any
) -> tokenizers.Tokenizer:
    """Returns the tokenizer as transformers' LlamaTokenizer has it, where one is declared.

    That class takes vocabulary and merges alone from tokenizer.json. A space goes before
    the text only, and not before what follows a special token, unless `legacy` is true.

    Source: transformers 5.24, models/llama/tokenization_llama.py; which folders it is for:
    models/auto/tokenization_auto.py.
    """
    name = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if name != "LlamaTokenizer" or model_type in _AS_JSON_SAYS:
        return made
    whole = json.loads(made.to_str())
    if whole["model"].get("type") != "BPE" or '"ByteLevel"' in json.dumps(
        [whole.get("pre_tokenizer"), whole.get("decoder")]
    ):
        return made
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": space}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    whole["model"] |= {"byte_fallback": True, "fuse_unk": True, "dropout": None}
    whole["normalizer"] = None
    whole["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": space,
        "prepend_scheme": scheme,
        "split": False,
    }
    whole["decoder"] = {"type": "Sequence", "decoders": decoders}
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name; those in files replace those in the config."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if found := {name: read_text(f) for name, f in files.items() if os.path.lexists(f)}:
        return found
    stored = settings.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT: stored}
    if isinstance(stored, dict):
        return dict(stored)
    return {one["name"]: one["template"] for one in stored}
