"""GGUF metadata <-> tokenizer.json.

Two kinds of tokenizer are known, both of merges:

- "gpt2": byte-level BPE. How text is cut into words is metadata by name alone
  (tokenizer.ggml.pre); the expressions are in llama.cpp, and here in _PRE.
- "llama": SentencePiece BPE. There are scores instead of merges: of two neighbours that
  make a token, those of the highest score merge first.

On writing, the tokenizer is read back from the metadata and must split a probe text as
the folder's does.

Source of the expressions and of what an absent setting means: llama.cpp
src/llama-vocab.cpp.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qlora_jax.errors import CheckpointError
from qlora_jax.inputs import read_json
from qlora_jax.text import bounded
from qlora_jax.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Hugging Face's name of a special token -> that in metadata."""

_KEPT_SPACES = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's special tokens that do not take the spaces after them along."""

PROBE = (
    "It's 2024, I'LL say: naïve cafe\N{COMBINING ACUTE ACCENT} 3.14159 + 1234567\t\tf(x) "
    "+= x**2;  // ok?!\r\n\n   indented\n \n日本語とKanji, привет мир, שלום, ½ "
    "Ⅷ \N{ROCKET}\N{ZERO WIDTH JOINER}!!!...\n  '''end''' "
)


class _Pre(NamedTuple):
    """Says how text is cut into words before it is cut into tokens.

    Attributes:
      words: The expression; None for GPT-2's own.
      digits: Every digit is a word, before that.
      whole: A word that is a token is taken as it is, whatever the merges.
      bos: Texts begin with BOS where the metadata do not say.
      nfc: Text is composed first (as Hugging Face does; llama.cpp does not).
    """

    words: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_MAX_TOKEN = 4096
"""Characters of a token; the work of finding its merges grows with their square."""


def _words(digits: str) -> str:
    """Returns the expression of GPT-4's tokenizer and its kin."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = _Pre(_words(r"\p{N}{1,3}"), whole=True, bos=True)
_QWEN2 = _Pre(_words(r"\p{N}"), nfc=True)
_PRE = {
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(nfc=False),
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3._replace(whole=False, bos=False),
    # Other names of the same; those above are written.
    "starcoder": _Pre(digits=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3._replace(whole=False, bos=False),
}


def read(meta: dict[str, Any]) -> Tokenizer:
    """Makes the tokenizer of a file's metadata.

    Raises:
      CheckpointError: it is of an unknown kind, or its parts do not fit.
    """
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; known: gpt2, llama")
    if kind == "gpt2" and pre not in _PRE:
        known = ", ".join(_PRE)
        raise CheckpointError(f"tokenizer.ggml.pre is {pre!r}; known: {known}")
    try:
        tokens: list[str] = meta["tokenizer.ggml.tokens"]
        if (longest := max(map(len, tokens), default=0)) > _MAX_TOKEN:
            raise CheckpointError(
                f"tokenizer.ggml.tokens has one of {longest} characters, expected at most "
                f"{_MAX_TOKEN}"
            )
        types = meta.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        if kind == "gpt2":
            made = _byte_level(tokens, types, meta["tokenizer.ggml.merges"], _PRE[pre])
        else:
            made = _sentencepiece(tokens, types, meta)
        ids = {
            name: meta.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "unknown", "padding", "eot", "eom")
        }
        special = {
            f"{key}_token": tokens[token]
            for key, name in _SPECIAL.items()
            if (token := ids[name]) is not None
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"its tokenizer is damaged: {error!r}") from None
    adds_bos = kind == "llama" or _PRE[pre].bos
    adds_bos = meta.get("tokenizer.ggml.add_bos_token", adds_bos)
    ends = (ids[name] for name in ("eos", "eot", "eom"))
    after = (ids["eos"],) if meta.get("tokenizer.ggml.add_eos_token") else ()
    return Tokenizer(
        made,
        bos_id=ids["bos"] if adds_bos else None,
        after=[i for i in after if i is not None],
        eos_ids=list(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=meta.get("tokenizer.chat_template"),
        special_tokens=special,
    )


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    pairs = zip(tokens, types, strict=True)
    return {t: i for i, (t, kind) in enumerate(pairs) if kind != _UNUSED}


def _add_tokens(
    made: tokenizers.Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    *,
    strips: bool = False,
) -> tokenizers.Tokenizer:
    """Adds what is matched in a text before it is cut; returns the tokenizer."""
    added = [i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL, _USER)]
    made.add_tokens(
        [
            tokenizers.AddedToken(
                tokens[i],
                special=types[i] != _USER,
                normalized=False,
                rstrip=strips and types[i] != _USER and tokens[i] not in _KEPT_SPACES,
            )
            for i in added
        ]
    )
    return made


def _bpe(**parts: Any) -> models.BPE:
    try:
        return models.BPE(**parts)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(str(error)) from None


def _byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: _Pre
) -> tokenizers.Tokenizer:
    pairs = [(merge[: merge.index(" ", 1)], merge) for merge in merges]
    model = _bpe(
        vocab=_vocabulary(tokens, types),
        merges=[(left, merge[len(left) + 1 :]) for left, merge in pairs],
        ignore_merges=pre.whole,
    )
    made = tokenizers.Tokenizer(model)
    if pre.nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _pre_tokenizer(pre)
    made.decoder = decoders.ByteLevel()
    return _add_tokens(made, tokens, types)


def _pre_tokenizer(pre: _Pre) -> pre_tokenizers.PreTokenizer:
    steps: list[Any] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.words is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pre.words), "isolated"))
    gpt2 = pre.words is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], meta: dict[str, Any]
) -> tokenizers.Tokenizer:
    # User-defined tokens are stored with the spaces they match.
    tokens = [
        t.replace(" ", _SPACE) if kind == _USER else t
        for t, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = _vocabulary(tokens, types)
    scores = meta["tokenizer.ggml.scores"]
    made = tokenizers.Tokenizer(
        _bpe(
            vocab=vocabulary,
            merges=_merges(tokens, types, scores, vocabulary),
            unk_token=tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    marks = normalizers.Replace(" ", _SPACE)
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*prepend, marks])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *strip])
    strips = meta.get("general.architecture") == "phi3"
    return _add_tokens(made, tokens, types, strips=strips)


def _merges(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    vocabulary: dict[str, int],
) -> list[tuple[str, str]]:
    """Returns every pair of tokens that makes a token, the highest score first."""
    parts = {t for t, i in vocabulary.items() if types[i] in (_NORMAL, _USER)}
    found = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind in (_NORMAL, _USER):
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in parts and right in parts:
                    found.append((-score, -len(left), left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def write(folder: Path, source: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns the metadata of a folder's tokenizer.

    Args:
      folder: A folder with tokenizer.json and tokenizer_config.json.
      source: The object of its config.json.
      vocab_size: Tokens that the model has; those the tokenizer lacks are unused.

    Raises:
      CheckpointError: it is missing, of a kind that GGUF files do not name, or would
        split a text otherwise than in its folder.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.open(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer.json; a GGUF file needs one")
    raw = tokenizers.Tokenizer.from_file(str(path))
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    model = json.loads(raw.to_str())["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise CheckpointError(
            f"{path} is of type {model['type']} with {len(model.get('merges', ()))} merges; "
            "a GGUF file can hold BPE with merges"
        )
    vocabulary = raw.get_vocab(with_added_tokens=True)
    if (largest := max(vocabulary.values())) >= vocab_size:
        raise CheckpointError(
            f"{path} has ids up to {largest}, but config.json a vocab_size of {vocab_size}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _NORMAL
    for i, added in raw.get_added_tokens_decoder().items():
        types[i] = _CONTROL if added.special else _USER
    meta: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": i
        for name, i in _special_ids(tokenizer, raw, settings, source).items()
        if i is not None
    }
    if tokenizer.chat_template is not None:
        meta["tokenizer.chat_template"] = tokenizer.chat_template
    bos = meta.get("tokenizer.ggml.bos_token_id")
    adds_bos = settings.get("add_bos_token")
    if not isinstance(adds_bos, bool):
        adds_bos = bos is not None and (
            bounded.encode(raw, ["a"], special=True)[0].ids[:1] == [bos]
        )
    meta["tokenizer.ggml.add_bos_token"] = adds_bos
    kinds = _sentencepiece_parts if model["byte_fallback"] else _byte_level_parts
    for parts in kinds(raw, model, tokens, types):
        made = read(meta | parts)
        if made.encode(PROBE) == bounded.encode(raw, [PROBE])[0].ids:
            return meta | parts
    raise CheckpointError(
        f"{path} splits text in a way that no GGUF file names (known: SentencePiece BPE, "
        f"and byte-level BPE as in {', '.join(_PRE)})"
    )


def _special_ids(
    tokenizer: Tokenizer,
    raw: tokenizers.Tokenizer,
    settings: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, int | None]:
    def named(key: str) -> int | None:
        text = settings.get(f"{key}_token")
        text = text.get("content") if isinstance(text, dict) else text
        return None if text is None else raw.token_to_id(text)

    bos, ends = tokenizer.bos_id, tokenizer.eos_ids
    return {
        "bos": source.get("bos_token_id") if bos is None else bos,
        "unknown": named("unk"),
        "padding": named("pad"),
        **dict(zip(("eos", "eot", "eom"), ends, strict=False)),
    }


def _byte_level_parts(
    raw: tokenizers.Tokenizer,
    model: dict[str, Any],
    tokens: list[str],
    types: list[int],
) -> list[dict[str, Any]]:
    """Returns the metadata of each way of cutting text that may be this tokenizer's."""
    if raw.pre_tokenizer is None:
        return []
    with bounded.no_panic():
        cut = raw.pre_tokenizer.pre_tokenize_str(PROBE)
    pieces = [piece for piece, _ in cut]
    parts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in model["merges"]],
    }
    return [
        parts | {"tokenizer.ggml.pre": name}
        for name, pre in _PRE.items()
        if pre.whole == model["ignore_merges"]
        and pieces == [p for p, _ in _pre_tokenizer(pre).pre_tokenize_str(PROBE)]
    ]


def _sentencepiece_parts(
    raw: tokenizers.Tokenizer,
    model: dict[str, Any],
    tokens: list[str],
    types: list[int],
) -> list[dict[str, Any]]:
    """Returns the metadata with and without a space before the text."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    types, texts = list(types), list(tokens)
    for i, token in enumerate(tokens):
        if token == model["unk_token"]:
            types[i] = _UNKNOWN
        elif types[i] == _USER:
            texts[i] = token.replace(_SPACE, " ")
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = _BYTE
    parts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(ranks.get(t, len(ranks))) for t in tokens],
    }
    return [parts | {"tokenizer.ggml.add_space_prefix": on} for on in (True, False)]
