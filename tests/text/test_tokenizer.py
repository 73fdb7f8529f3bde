"""Tokenizers of model folders: special tokens, templates, and what is refused."""

import json
from pathlib import Path

import pytest
import tiny

from qlora_jax.errors import CheckpointError, DataError
from qlora_jax.inputs import read_json
from qlora_jax.text.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
]


def write(folder: Path, **files: object) -> Path:
    """Writes a tokenizer and JSON files, named without their ending."""
    tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def opened(folder: Path, **files: object) -> Tokenizer:
    tokenizer = Tokenizer.open(write(folder, **files))
    assert tokenizer is not None
    return tokenizer


def test_a_folder_without_one_gives_none(tmp_path):
    assert Tokenizer.open(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        ({"bos_token": "<s>"}, {}, tiny.BOS),
        ({"bos_token": {"content": "<s>", "lstrip": False}}, {}, tiny.BOS),
        ({"bos_token": None}, {"bos_token_id": 5}, None),  # null means none (Qwen2)
        ({}, {"bos_token_id": 5}, 5),
        ({}, {}, None),
        ({"bos_token": "<absent>"}, {"bos_token_id": 5}, 260),  # added, as transformers
    ],
)
def test_bos_is_the_tokenizers_own(tmp_path, settings, model, expected):
    assert opened(tmp_path, tokenizer_config=settings, config=model).bos_id == expected


@pytest.mark.parametrize(
    ("settings", "generation", "model", "expected"),
    [
        ({"eos_token": "</s>"}, {}, {}, (tiny.EOS,)),
        (
            {"eos_token": "</s>"},
            {"eos_token_id": [7, tiny.EOS, 9]},
            {},
            (tiny.EOS, 7, 9),
        ),
        ({}, {"eos_token_id": 7}, {"eos_token_id": 8}, (7,)),
        ({}, {}, {"eos_token_id": [8, 9]}, (8, 9)),
        ({}, {}, {}, ()),
    ],
)
def test_eos_ids_are_gathered_the_tokenizers_first(
    tmp_path, settings, generation, model, expected
):
    tokenizer = opened(
        tmp_path, tokenizer_config=settings, generation_config=generation, config=model
    )
    assert tokenizer.eos_ids == expected


def test_text_goes_to_ids_and_back_without_special_tokens(tmp_path):
    tokenizer = opened(tmp_path)
    ids = tokenizer.encode("héllo\n")
    assert len(ids) == len("héllo\n".encode())
    assert tokenizer.decode([tiny.BOS, *ids, tiny.EOS]) == "héllo\n"
    assert tokenizer.encode_batch(["a", "bc"]) == [
        tokenizer.encode("a"),
        tokenizer.encode("bc"),
    ]
    assert tokenizer.vocab_size == 260


def test_special_tokens_in_a_text_are_recognised(tmp_path):
    assert opened(tmp_path).encode("<s>a")[0] == tiny.BOS


def test_what_tokenizer_json_adds_cuts_or_pads_is_left_out(tmp_path):
    from tokenizers import processors

    raw = tiny.byte_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny.BOS)]
    )
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode_batch(["abcdef", "a"])[1]) == 1


def test_a_chat_template_renders_messages(tmp_path):
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": tiny.CHAT_TEMPLATE,
    }
    tokenizer = opened(tmp_path, tokenizer_config=settings)
    assert tokenizer.chat(MESSAGES) == "<s><user>hi<assistant>yo</s>"
    prompt = tokenizer.chat(MESSAGES[:1], add_generation_prompt=True)
    assert prompt == "<s><user>hi<assistant>"


def test_a_template_file_wins_over_the_config(tmp_path):
    write(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new {{ messages|length }}")
    assert Tokenizer.open(tmp_path).chat(MESSAGES) == "new 2"


def test_templates_are_rendered_as_transformers_does(tmp_path):
    template = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "    {{- {'ü': m.content}|tojson }}\n"
        "{%- endfor %}\n"
    )
    tokenizer = opened(tmp_path, tokenizer_config={"chat_template": template})
    assert tokenizer.chat(MESSAGES) == '{"ü": "hi"}{"ü": "yo"}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses the messages"),
        ("{% if %}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
    ],
)
def test_a_template_that_fails_is_a_data_error(tmp_path, template, message):
    tokenizer = opened(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(DataError, match=message):
        tokenizer.chat(MESSAGES)


def test_messages_without_a_template_are_refused(tmp_path):
    with pytest.raises(DataError, match="no chat template.*'input' and 'output'"):
        opened(tmp_path).chat(MESSAGES)


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8: byte 0 is 0xff"),
        (b"[1]", "list, expected an object"),
    ],
)
def test_a_broken_settings_file_is_named(tmp_path, data, message):
    (write(tmp_path) / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json .*{message}"):
        Tokenizer.open(tmp_path)


def test_a_json_file_that_is_not_there_is_empty(tmp_path):
    assert read_json(tmp_path / "absent.json", optional=True) == {}


def test_the_stories_tokenizer_is_read(shared):
    tokenizer = Tokenizer.open(shared / "models/stories15m")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    ids = tokenizer.encode("Once upon a time")
    assert len(ids) == 4 and tokenizer.decode(ids) == "Once upon a time"
