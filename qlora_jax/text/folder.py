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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from qlora_jax.errors import CheckpointError, OutputExistsError, gathered
from qlora_jax.files import NewFolder
from qlora_jax.text import convert

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
    if path.exists():
        try:
            made = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} is no tokenizer: {error}") from None
    elif source := convert.source_of(folder):
        made, named = convert.convert(source)
    else:
        return None
    settings, added = _settings(folder)
    model = read_json(folder / "config.json")
    if isinstance(inner := model.get("text_config"), dict):  # of a multimodal model
        model = inner | model
    if path.exists():
        made = _as_its_class(made, settings, model.get("model_type"))
    special = named | _special_tokens(settings)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    _add_tokens(made, settings, added, special, folder)
    ids = {key: made.token_to_id(text) for key, text in special.items()}
    generation = read_json(folder / "generation_config.json")
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
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    declared = settings.get("added_tokens_decoder")
    try:
        if declared is not None:
            return settings, {int(i): _added(t) for i, t in declared.items()}
        settings |= read_json(path := folder / "special_tokens_map.json")
        special = {_text(v) for k, v in settings.items() if k.endswith("_token")}
        special.update(_text(t) for t in _extra(settings))
        path = folder / "added_tokens.json"
        return settings, {
            int(i): tokenizers.AddedToken(
                text, special=text in special, normalized=text not in special
            )
            for text, i in read_json(path).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} declares tokens in a form that is not known: {error!r}"
        ) from None


def _text(value: Any) -> str | None:
    """Returns the text of a token, which is a string or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _added(value: Any) -> tokenizers.AddedToken:
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    if isinstance(value, str):
        return tokenizers.AddedToken(value)
    flags = {name: value[name] for name in names if name in value}
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
    for token in (
        token for _, token in sorted(added.items()) if repr(token) not in had
    ):
        if token.content in roles:
            token.special = True
        made.add_tokens([token])
    known = {token.content for token in made.get_added_tokens_decoder().values()}
    for key, text in special.items():
        value = settings.get(key)
        if text and text not in known:
            token = _added(value if isinstance(value, dict) else text)
            token.special = True
            made.add_tokens([token])
    for value in _extra(settings):
        if _text(value) not in known:
            token = _added(value)
            token.special = True
            made.add_tokens([token])
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
    if found := {name: read_text(f) for name, f in files.items() if f.is_file()}:
        return found
    stored = settings.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT: stored}
    try:
        if isinstance(stored, dict):
            return {str(name): str(text) for name, text in stored.items()}
        return {str(one["name"]): str(one["template"]) for one in stored}
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a "
            "list of objects with 'name' and 'template'"
        ) from None


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      CheckpointError: it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} where there is no file.

    Raises:
      CheckpointError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds {type(value).__name__}, expected an object"
        )
    return value
