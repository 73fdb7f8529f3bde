"""Conversations and tokenizers that the chat templates are tried with.

Imports neither jax nor transformers: scripts/make/golden_chat.py uses it with the latter.
"""

import functools
import json
from typing import Any

import tokenizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIAL = (
    "<s> </s> <|im_start|> <|im_end|> <|user|> <|assistant|> <|system|> <|end|> "
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> "
    "[INST] [/INST] <think> </think> <|return|> [|endofturn|]"
).split()

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
_CALL = {
    "id": "c12345678",
    "type": "function",
    "function": {"name": "weather", "arguments": {"at": "Ulm"}},
}


def turns(*contents: Any) -> list[dict[str, Any]]:
    """Returns messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def parts(text: str) -> list[dict[str, str]]:
    """Returns a content as two parts of text."""
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": turns("Name a color", "Blue is one.")},
    "two turns": {
        "messages": turns("Name a", "Blue.", "Another", "Red, naïve \U0001f642")
    },
    "three turns, system": {
        "messages": [
            {"role": "system", "content": "Be short"},
            *turns("a", "b", " c", "d ", "e", "f\n\ng"),
        ]
    },
    "thoughts": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "reasoning_content": "so"},
        ]
    },
    "thoughts in the text": {
        "messages": turns("a", "<think>\nhm\n</think>\n\nb", "c", "<think>so</think>d")
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {
                "role": "tool",
                "name": "weather",
                "content": "42",
                "tool_call_id": "c12345678",
            },
            {"role": "assistant", "content": "It is 42."},
        ],
        "tools": [TOOL],
    },
    "no thinking": {
        "messages": turns("Name a color", "Blue."),
        "enable_thinking": False,
    },
    "documents": {
        "messages": turns("What?", "That."),
        "documents": [{"title": "t", "text": "some text"}],
    },
    "parts": {"messages": turns(parts("Name it"), parts("Blue"))},
}


def byte_level() -> tokenizers.Tokenizer:
    """Returns one with a few merges, which does not touch a text before cutting it."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Bl", "ue", "Blue", "ĠBl", "ĠBlue", "ĊĊ", "Ġa", "Re", "Red", "..", "Ġis"]
    pairs = "B l,u e,Bl ue,Ġ Bl,ĠBl ue,Ċ Ċ,Ġ a,R e,Re d,. .,Ġ is,i s"
    merges = [(a, b) for a, b in (pair.split(" ") for pair in pairs.split(","))]
    vocab = {c: i for i, c in enumerate([*alphabet, *words, "is"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def sentencepiece(legacy: bool) -> tokenizers.Tokenizer:
    """Returns one that puts a space before each text (legacy), or before the first only."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    characters = [chr(c) for c in range(33, 127)]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["Bl", "ue", "Blue", "Bl", "Re", "Red", "is", "Na", "me", "Name"]
    words += [
        SPACE + w for w in ("B", "Bl", "Blue", "a", "Re", "Red", "is", "Name", "R")
    ]
    pairs = f"B l,u e,Bl ue,{SPACE} Blue,{SPACE} a,R e,Re d,{SPACE} Red,i s,{SPACE} is,"
    pairs += f"N a,m e,Na me,{SPACE} Name"
    texts = dict.fromkeys(["<unk>", *bytes_, SPACE, *characters, *words])
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=[(a, b) for a, b in (pair.split(" ") for pair in pairs.split(","))],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(SPECIAL)
    return made


@functools.cache
def all_tokenizers() -> dict[str, tokenizers.Tokenizer]:
    """Returns name -> tokenizer."""
    return {
        "byte-level": byte_level(),
        "sentencepiece": sentencepiece(legacy=False),
        "legacy": sentencepiece(legacy=True),
    }


def row_of(name: str) -> dict[str, Any]:
    """Returns a copy of a row."""
    return json.loads(json.dumps(ROWS[name]))
