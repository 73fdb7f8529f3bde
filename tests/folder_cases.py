"""Folders of tokenizers, each with its declarations in another place.

What they come out as was compared with transformers 5.24. Imports neither jax nor
transformers.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import chat_cases
import tokenizers
from tokenizers import processors

TEXT = "<s>Blue<a> b<b>Name</s> x"


class Case(NamedTuple):
    """Files beside tokenizer.json, and what the folder is.

    Attributes:
      files: Name -> JSON.
      tokens: Those of TEXT that differ from the tokens of the folder without files.
      special: The special tokens that a template gets.
      post: Post-processor: None for none, "bos" or "both".
      kind: Of chat_cases.all_tokenizers.
    """

    files: dict[str, Any]
    added: tuple[str, ...] = ()
    special: dict[str, str] = {}
    post: str | None = None
    kind: str = "byte-level"


def declared(**tokens: int) -> dict[str, Any]:
    """Returns an added_tokens_decoder; the names are letters between brackets."""
    return {
        str(i): {"content": f"<{name}>", "special": False, "normalized": False}
        for name, i in tokens.items()
    }


SIZE = chat_cases.byte_level().get_vocab_size()
CASES = {
    "nothing": Case({}),
    "config": Case(
        {"tokenizer_config": {"eos_token": "</s>"}}, (), {"eos_token": "</s>"}
    ),
    "token as an object": Case(
        {"tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<s>"}}},
        (),
        {"bos_token": "<s>"},
    ),
    "added_tokens_decoder": Case(
        {"tokenizer_config": {"added_tokens_decoder": declared(a=SIZE, b=SIZE + 1)}},
        ("<a>", "<b>"),
    ),
    "eos in added_tokens_decoder": Case(
        {
            "tokenizer_config": {
                "added_tokens_decoder": declared(a=SIZE),
                "eos_token": "<a>",
            }
        },
        ("<a>",),
        {"eos_token": "<a>"},
    ),
    "added_tokens.json": Case(
        {"added_tokens": {"<b>": SIZE + 1, "<a>": SIZE}}, ("<a>", "<b>")
    ),
    "added_tokens.json beside a decoder": Case(
        {
            "tokenizer_config": {"added_tokens_decoder": declared(a=SIZE)},
            "added_tokens": {"<b>": SIZE + 1},
        },
        ("<a>",),
    ),
    "special_tokens_map.json": Case(
        {"special_tokens_map": {"eos_token": {"content": "<a>"}, "pad_token": "<b>"}},
        ("<a>", "<b>"),
        {"eos_token": "<a>", "pad_token": "<b>"},
    ),
    "special_tokens_map.json over the config": Case(
        {
            "tokenizer_config": {"eos_token": "</s>"},
            "special_tokens_map": {"eos_token": "<a>"},
        },
        ("<a>",),
        {"eos_token": "<a>"},
    ),
    "special_tokens_map.json beside a decoder": Case(
        {
            "tokenizer_config": {"added_tokens_decoder": declared(b=SIZE)},
            "special_tokens_map": {"eos_token": "<a>"},
        },
        ("<b>",),
    ),
    "additional_special_tokens": Case(
        {"tokenizer_config": {"additional_special_tokens": ["<a>", "<b>"]}},
        ("<a>", "<b>"),
    ),
    "extra_special_tokens by name": Case(
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<a>"}}},
        ("<a>",),
        {"image_token": "<a>"},
    ),
    "tokens with a role of the model's own": Case(
        {"tokenizer_config": {"eot_token": "<a>"}}, ("<a>",), {"eot_token": "<a>"}
    ),
    "an eos that is no token": Case(
        {"tokenizer_config": {"eos_token": "<a>"}}, ("<a>",), {"eos_token": "<a>"}
    ),
    "bos added by the tokenizer": Case(
        {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}},
        (),
        {"bos_token": "<s>"},
        "bos",
    ),
    "bos and eos added by the tokenizer": Case({}, (), {}, "both"),
    "bos asked for in the config alone": Case(
        {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}},
        (),
        {"bos_token": "<s>"},
    ),
    **{
        f"{name}, legacy {legacy}, {kind}": Case(
            {
                "tokenizer_config": {
                    "tokenizer_class": name,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    **({} if legacy is None else {"legacy": legacy}),
                },
                "config": {"model_type": kind},
            },
            (),
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
            "bos",
            "legacy",
        )
        for name in ("LlamaTokenizer", "PreTrainedTokenizerFast")
        for legacy in (None, True, False)
        for kind in ("llama", "mistral", "phi3")
    },
}


def write(folder: Path, case: Case) -> Path:
    """Writes a case's files."""
    made = tokenizers.Tokenizer.from_str(
        chat_cases.all_tokenizers()[case.kind].to_str()
    )
    if case.post is not None:
        ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
        single = {"bos": "<s> $A", "both": "<s> $A </s>"}[case.post]
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=ids
        )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, value in case.files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
