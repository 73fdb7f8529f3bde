"""Tokenizers of folders: every file that declares something, as transformers takes it."""

import json
from pathlib import Path

import chat_cases
import folder_cases
import pytest

from qlora_jax.errors import CheckpointError, ConfigError, DataError
from qlora_jax.text import Tokenizer

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "chat.json").read_text(encoding="utf-8")
)["folders"]
ONE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", folder_cases.CASES)
def test_a_folder_opens_as_in_transformers(tmp_path, name):
    case, golden = folder_cases.CASES[name], GOLDEN[name]
    tokenizer = Tokenizer.open(folder_cases.write(tmp_path, case))
    assert tokenizer is not None
    assert tokenizer.encode(folder_cases.TEXT) == golden["ids"]
    ids = tokenizer.encode("Blue b")
    assert [*tokenizer.before, *ids, *tokenizer.after] == golden["plain"]
    assert tokenizer._special_tokens == golden["special"] == case.special
    if case.kind == "byte-level":
        added = [
            tokenizer.token_of(i) for i in range(folder_cases.SIZE, tokenizer.rows)
        ]
        assert added == list(case.added)


def test_ids_other_than_declared_are_said(tmp_path, caplog):
    case = folder_cases.Case(
        {"tokenizer_config": {"added_tokens_decoder": folder_cases.declared(a=900)}}
    )
    Tokenizer.open(folder_cases.write(tmp_path, case))
    assert f"'<a>' {folder_cases.SIZE} instead of 900" in caplog.text


def test_eos_ids_come_from_all_files(tmp_path):
    case = folder_cases.Case(
        {
            "tokenizer_config": {
                "added_tokens_decoder": folder_cases.declared(a=folder_cases.SIZE),
                "eos_token": "<a>",
            },
            "generation_config": {"eos_token_id": [5, folder_cases.SIZE]},
            "config": {"eos_token_id": 7},
        }
    )
    tokenizer = Tokenizer.open(folder_cases.write(tmp_path, case))
    assert tokenizer is not None and tokenizer.eos_ids == (folder_cases.SIZE, 5)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": ["<a>"]}},
        {"tokenizer_config": {"added_tokens_decoder": {"300": {"text": "<a>"}}}},
        {"added_tokens": {"<a>": "x"}},
        {"tokenizer_config": {"eos_token": {"text": "a"}}},
        {"tokenizer_config": {"eos_token": 3}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": "<a>"}}},
        {"tokenizer_config": {"extra_special_tokens": [3]}},
        {"generation_config": {"eos_token_id": True}},
        {"generation_config": {"eos_token_id": [[1]]}},
        {"config": {"bos_token_id": -5}},
        {"config": {"bos_token_id": 0.5}},
    ],
)
def test_declarations_of_another_form_are_refused(tmp_path, files):
    folder = folder_cases.write(tmp_path, folder_cases.Case(files))
    with pytest.raises(CheckpointError, match=r"json cannot be used \(1 problem\)"):
        Tokenizer.open(folder)


# --- templates


def with_templates(tmp_path: Path, stored: object, **files: str) -> Tokenizer:
    case = folder_cases.Case({"tokenizer_config": {"chat_template": stored}})
    folder = folder_cases.write(tmp_path, case)
    for name, text in files.items():
        if name == "default":
            path = folder / "chat_template.jinja"
        else:
            path = folder / "additional_chat_templates" / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None
    return tokenizer


NAMED = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "with {{ tools | length }}"},
    {"name": "rag", "template": "ü {{ documents }}"},
]


def test_a_list_of_named_templates_is_told_apart_by_tools(tmp_path):
    tokenizer = with_templates(tmp_path, NAMED)
    messages = chat_cases.turns("a")
    assert tokenizer.chat(messages) == "plain"
    assert tokenizer.chat(messages, tools=[chat_cases.TOOL]) == "with 1"
    assert tokenizer.with_chat_template("rag").chat(messages) == "ü None"
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.open(tmp_path / "saved")
    assert again is not None and again.chat_templates == tokenizer.chat_templates


def test_templates_in_files_replace_those_in_the_config(tmp_path):
    tokenizer = with_templates(tmp_path, NAMED, default="new", tool_use="ö")
    assert tokenizer.chat_templates == {"default": "new", "tool_use": "ö"}


def test_several_templates_without_a_default_have_to_be_chosen(tmp_path):
    tokenizer = with_templates(tmp_path, NAMED[1:])
    with pytest.raises(DataError, match=r"several chat templates \(tool_use, rag\)"):
        tokenizer.chat(chat_cases.turns("a"))
    assert tokenizer.with_chat_template("rag").chat(chat_cases.turns("a"))


def test_a_template_of_ones_own_is_a_file(tmp_path):
    tokenizer = with_templates(tmp_path, None)
    with pytest.raises(DataError, match="give one with --data.chat-template FILE"):
        tokenizer.chat(chat_cases.turns("a"))
    (tmp_path / "own.jinja").write_text("ß" + ONE, encoding="utf-8")
    own = tokenizer.with_chat_template(str(tmp_path / "own.jinja"))
    assert own.chat(chat_cases.turns("a")) == "ßa"
    with pytest.raises(ConfigError, match="nowhere is no file.*it has: none"):
        tokenizer.with_chat_template("nowhere")
    (tmp_path / "own.jinja").write_bytes("ß".encode("latin-1"))
    with pytest.raises(CheckpointError, match="own.jinja is not UTF-8"):
        tokenizer.with_chat_template(str(tmp_path / "own.jinja"))


def test_a_chat_template_of_another_form_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template\[0\].template is null"):
        with_templates(tmp_path, [{"name": "default"}])


# --- tokenizer.model alone


def test_a_folder_with_tokenizer_model_alone_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x00")
    with pytest.raises(CheckpointError) as refused:
        Tokenizer.open(tmp_path)
    message = str(refused.value)
    if "cannot be converted" not in message:  # where the converter is installed
        assert "has tokenizer.model and no tokenizer.json" in message
        assert "pip install 'transformers>=5' sentencepiece protobuf" in message
        assert (
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)" in message
        )
