"""Prompts from JSON lines."""

from pathlib import Path

import pytest
import tiny

from qlora_jax.data.prompts import read_prompts
from qlora_jax.errors import DataError


def read(tmp_path: Path, *rows, **options):
    path = tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    tokenizer = options.pop("tokenizer", tiny.tokenizer())
    return read_prompts(path, tokenizer, **options)


def test_a_prompt_starts_with_bos_and_keeps_its_row(tmp_path: Path):
    rows = [{"prompt": "ab", "id": 7}, {"input": "c", "output": "d"}]
    first, second = read(tmp_path, *rows)
    ids = tiny.tokenizer().encode
    assert first.tokens == [tiny.BOS, *ids("ab")] and first.row == rows[0]
    assert second.tokens == [tiny.BOS, *ids("c")] and second.row == rows[1]


def test_messages_go_through_the_template_without_a_last_answer(tmp_path: Path):
    turns = [{"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "yes"}
    asked, answered = read(
        tmp_path, {"messages": turns}, {"messages": [*turns, answer]}
    )
    assert asked.tokens == answered.tokens
    assert tiny.tokenizer().decode(asked.tokens) == "hi"
    assert asked.tokens.count(tiny.BOS) == 1 and asked.tokens[-1] == tiny.ASSISTANT
    (chat,) = read(tmp_path, {"prompt": "hi"}, chat=True)
    assert chat.tokens == asked.tokens


def test_adapters_are_looked_at_where_names_are_given(tmp_path: Path):
    rows = [{"prompt": "a", "adapter": "x"}, {"prompt": "a"}]
    given = read(tmp_path, *rows, adapters=("base", "x"))
    assert [prompt.adapter for prompt in given] == ["x", None]
    assert [prompt.adapter for prompt in read(tmp_path, *rows)] == [None, None]


def test_all_lines_that_cannot_be_used_are_named(tmp_path: Path):
    rows = [
        {"text": "a"},
        {"prompt": 3},
        {"prompt": "a", "adapter": "y"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": []},
        [1],
        {"prompt": "fine"},
    ]
    with pytest.raises(DataError) as refused:
        read(tmp_path, *rows, adapters=("base", "x"))
    for line in (
        "p.jsonl:1: has 'text'; expected 'prompt', 'input' or 'messages'",
        "p.jsonl:2: 'prompt' is int, expected a string",
        "p.jsonl:3: 'adapter' is 'y', expected one of base, x",
        "p.jsonl:4: 'messages' has nothing but an answer",
        "p.jsonl:5: 'messages' is not a list with something in it",
        "p.jsonl:6: is list, expected an object",
    ):
        assert line in str(refused.value)


def test_a_prompt_without_tokens_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="p.jsonl:1: has a prompt without tokens"):
        read(tmp_path, {"prompt": ""}, tokenizer=tiny.tokenizer(bos=False))
