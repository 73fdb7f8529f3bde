"""Row forms: the exact text of each, what of it trains, and what each refusal says."""

import json
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_jax.data import DataConfig
from qlora_jax.data.forms import Former
from qlora_jax.data.tokenize import Row, tokenize
from qlora_jax.errors import ConfigError, DataError

ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n"
)
MORE = ", paired with an input that provides further context"
CHAT = "<s><user>{}<assistant>{}</s>"
A, B, C = (tiny.tokenizer().encode(letter)[0] for letter in "abc")
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def messages(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def share_gpt(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": name, "value": text} for name, text in turns]


def formed(row: dict[str, Any], **config: Any) -> Any:
    return Former(DataConfig(**config), tiny.tokenizer())(row)


def rows(row: dict[str, Any], **config: Any) -> list[Row]:
    examples = formed(row, **config).examples
    return tokenize(examples, tiny.tokenizer(), DataConfig(**config))


def shown(row: Row) -> str:
    """Returns a row's text, with what trains between bars."""
    text, ends = "", np.flatnonzero(np.diff(row.weights)) + 1
    for start, end in zip([0, *ends], [*ends, len(row.tokens)], strict=True):
        part = tiny.tokenizer().text_of(row.tokens[start:end].tolist())
        text += f"|{part}|" if row.weights[start] else part
    return text


FORMS = [
    ("pair", {"input": "2+2=", "output": "4"}, "<s>2+2=|4</s>|"),
    ("text", {"text": "Once upon"}, "<s>|Once upon</s>|"),
    (
        "alpaca",
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        f"<s>{ALPACA.format(MORE)}Add.\n\n### Input:\n2 2\n\n### Response:\n|4</s>|",
    ),
    (
        "alpaca",
        {"instruction": "Hi.", "input": "", "output": "hi"},
        f"<s>{ALPACA.format('')}Hi.\n\n### Response:\n|hi</s>|",
    ),
    (
        "alpaca",
        {"instruction": "Hi.", "context": "now", "response": "hi"},
        f"<s>{ALPACA.format(MORE)}Hi.\n\n### Input:\nnow\n\n### Response:\n|hi</s>|",
    ),
    (
        "alpaca",
        {"system": "Be brief.", "instruction": "Hi.", "input": None, "output": "hi"},
        "<s>Be brief.\n\n### Instruction:\nHi.\n\n### Response:\n|hi</s>|",
    ),
    ("completion", {"prompt": "2+2=", "completion": "4"}, "<s>2+2=|4</s>|"),
    ("completion", {"prompt": "2+2=", "completion": "4</s>"}, "<s>2+2=|4</s>|"),
    (
        "completion",
        {"prompt": messages(*TURNS[:3]), "completion": messages(TURNS[3])},
        "<s><user>a<assistant>b</s><user>c<assistant>|d</s>|",
    ),
    (
        "messages",
        {"messages": messages(*TURNS)},
        "<s><user>a<assistant>|b</s>|<user>c<assistant>|d</s>|",
    ),
    (
        "messages",
        {"messages": json.dumps(messages(*TURNS[:2]))},
        "<s><user>a<assistant>|b</s>|",
    ),
    (
        "sharegpt",
        {"conversations": share_gpt(("human", "a"), ("gpt", "b"))},
        "<s><user>a<assistant>|b</s>|",
    ),
    (
        "sharegpt",
        {"conversation": messages(*TURNS[:2]), "system": "s"},
        "<s><system>s<user>a<assistant>|b</s>|",
    ),
    (
        "sharegpt",
        {
            "conversations": share_gpt(
                ("system", "s"), ("user", "a"), ("assistant", "b")
            )
        },
        "<s><system>s<user>a<assistant>|b</s>|",
    ),
    (
        "ids",
        {"input_ids": [256, A, B, 257], "labels": [-100, -100, B, 257]},
        "<s>a|b</s>|",
    ),
    ("ids", {"input_ids": [256, A, B]}, "|<s>ab|"),
    (
        "ids",
        {"input_ids": [A, B, 0, 0], "attention_mask": [1, 1, 0, 0]},
        "|ab|",
    ),
    ("ids", {"input_ids": [A, B], "completion_mask": [0, 1]}, "a|b|"),
    (
        "ids",
        {
            "input_ids": [A, B, C],
            "labels": [A, B, C],
            "assistant_masks": [0, 1, 0],
        },
        "a|b|c",
    ),
]


@pytest.mark.parametrize(("form", "row", "wanted"), FORMS)
def test_a_form_is_found_by_its_keys(form, row, wanted):
    made = formed(row)
    assert made.form == form and not made.unused and not made.unread
    (one,) = rows(row)
    assert shown(one) == wanted


@pytest.mark.parametrize(
    ("row", "config", "wanted"),
    [
        (
            {"question": "2+2=", "answer": "4"},
            {"columns": ("input=question", "output=answer")},
            "<s>2+2=|4</s>|",
        ),
        ({"q": "2+2=", "output": "4"}, {"input_key": "q"}, "<s>2+2=|4</s>|"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"columns": ("completion=chosen",)},
            "<s>a|b</s>|",
        ),
        (
            {"chosen": messages(*TURNS[:2]), "rejected": messages(*TURNS[:2])},
            {"columns": ("messages=chosen",)},
            "<s><user>a<assistant>|b</s>|",
        ),
        ({"content": "a b"}, {"columns": ("text=content",)}, "<s>|a b</s>|"),
        (
            {"question": "2+2", "n": 7, "output": "4"},
            {"prompt_template": "{{ n }}. {{ question }}?{% if x %} {{ x }}{% endif %}\nA:"},
            "<s>7. 2+2?\nA:|4</s>|",
        ),
        (
            {"question": "2+2", "answer": "4"},
            {"prompt_template": "Q: {{ question }} A:", "columns": ("output=answer",)},
            "<s>Q: 2+2 A:|4</s>|",
        ),
        ({"input": "a", "output": "b"}, {"chat": True}, "<s><user>a<assistant>|b</s>|"),
        (
            {"prompt": "a", "completion": "b", "system": "s"},
            {"chat": True},
            "<s><system>s<user>a<assistant>|b</s>|",
        ),
        (
            {"instruction": "a", "input": "more", "output": "b", "system": "s"},
            {"chat": True},
            "<s><system>s<user>a\n\nmore<assistant>|b</s>|",
        ),
        (
            {"question": "2", "output": "b"},
            {"chat": True, "prompt_template": "{{ question }}?"},
            "<s><user>2?<assistant>|b</s>|",
        ),
        (
            {"input_ids": [A, B], "labels": [-100, B]},
            {"train_on_prompt": True},
            "|ab|",
        ),
    ],
)  # fmt: skip
def test_settings_say_how_rows_are_read(row, config, wanted):
    (one,) = rows(row, **config)
    assert shown(one) == wanted


@pytest.mark.parametrize(
    ("row", "config", "unused"),
    [
        ({"input": "a", "output": "b", "id": 3, "note": None}, {}, {"id"}),
        ({"instruction": "a", "output": "b", "text": "ab"}, {}, {"text"}),
        ({"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"}, {},
         {"chosen", "rejected"}),
        ({"messages": messages(*TURNS), "prompt": "a", "tags": []}, {}, {"prompt"}),
        ({"input": "a", "output": "b", "system": "s"}, {}, {"system"}),
        (
            {"input": "a", "question": "q", "output": "b"},
            {"columns": ("input=question",)},
            {"input"},
        ),
        ({"input_ids": [A], "token_type_ids": [0], "text": "a"}, {},
         {"token_type_ids", "text"}),
        (
            {"messages": messages(("system", "x"), *TURNS[:2]), "system": "s"},
            {},
            {"system"},
        ),
        (
            {"question": "2", "level": 3, "output": "b"},
            {"prompt_template": "{{ question }}"},
            {"level"},
        ),
    ],
)  # fmt: skip
def test_fields_that_nothing_reads_are_named(row, config, unused):
    assert formed(row, **config).unused == unused


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"question": "a", "answer": "b"}, {},
         r"has 'question', 'answer'; expected .*--data.columns input=question output=answer$"),
        ({"Instruction": "a", "Response": "b"}, {},
         r"--data.columns input=Instruction output=Response"),
        ({"mesages": []}, {}, r"--data.columns messages=mesages"),
        ({}, {}, "has no keys; expected 'input' and 'output'"),
        ({"input": "a"}, {"columns": ("input=q", "output=a")},
         "has 'input', and not what --data.columns names: input=q, output=a"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {},
         "is a preference row.*--data.columns completion=chosen"),
        ({"chosen": "b", "rejected": "c"}, {}, "--data.columns text=chosen"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, {},
         "--data.columns prompt=question completion=chosen"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, {}, "output=chosen"),
        ({"prompt": "a", "canonical_solution": "b", "test": "c"}, {},
         "--data.columns input=prompt output=canonical_solution"),
        ({"chosen": messages(*TURNS), "rejected": messages(*TURNS)}, {},
         "--data.columns messages=chosen"),
        ({"prompt": "a", "completion": messages(*TURNS)}, {}, "of which one is messages"),
        ({"prompt": messages(TURNS[0]), "completion": messages(TURNS[0])}, {},
         "a completion without a turn of assistant"),
        ({"conversations": share_gpt(("elf", "b"))}, {}, "turn from 'elf', expected one of"),
        ({"conversations": [{"from": "human"}]}, {}, "'from' and without 'value'"),
        ({"conversations": [{"from": [], "value": "a"}]}, {}, "'from' is list, expected"),
        ({"conversations": share_gpt(("function_call", "no"))}, {}, "is no JSON"),
        ({"conversations": "a text"}, {}, "'conversations' is not a list"),
        ({"input_ids": []}, {}, "'input_ids' is empty"),
        ({"input_ids": [-1]}, {}, "numbers that are no ids"),
        ({"input_ids": "abc"}, {}, "'input_ids' is no list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, {}, "'labels' is not as long"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, {}, "labels are not shifted"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, {}, "hides tokens between"),
        ({"input_ids": [1], "attention_mask": [0]}, {}, "hides every token"),
        ({"text": "a"}, {"chat": True}, "has 'text', which has no turns"),
        ({"question": "a"}, {"prompt_template": "{{ question }}"}, "the answer is 'output'"),
        ({"q": "a", "output": "b"}, {"prompt_template": "{{ question }}"},
         "has 'q', 'output'; --data.prompt-template: 'question' is undefined"),
        ({"question": None, "output": "b"}, {"prompt_template": "{{ question }}"},
         "'question' is undefined"),
        ({"n": 1, "output": "b"}, {"prompt_template": "{{ n + 'a' }}"}, "refuses the row"),
        ({"n": "\ud800", "output": "b"}, {"prompt_template": "{{ n }}"}, "is no Unicode"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(row, config, message):
    with pytest.raises(DataError, match=message):
        formed(row, **config)


def test_calls_of_functions_in_sharegpt_are_tool_calls():
    from qlora_jax.data.conversations import conversation_of

    call = {"name": "add", "arguments": {"a": 1}}
    turns = share_gpt(
        *(("human", "a"), ("function_call", json.dumps(call)), ("observation", "2"))
    )
    made, _ = conversation_of({"conversations": turns}, "conversations")
    assert made[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    assert made[2] == {"role": "tool", "content": "2"}


def test_nulls_that_tables_put_into_messages_count_as_absent():
    turns = messages(*TURNS[:2])
    full = [
        {**turn, "tool_calls": None, "name": None, "weight": None} for turn in turns
    ]
    made = formed({"messages": full, "tools": None})
    assert made == formed({"messages": turns})
    turns[1] = {"role": "assistant", "content": None, "tool_calls": None}
    with pytest.raises(DataError, match="'content' is NoneType"):
        formed({"messages": turns})


def test_a_prompt_template_can_be_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("Frage: {{ frage }}\n", encoding="utf-8")
    (one,) = rows({"frage": "ä", "output": "b"}, prompt_template=str(path))
    assert shown(one) == "<s>Frage: ä|b</s>|"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prompt_template": "{question}"}, "reads no field of a row; write one as {{"),
        ({"prompt_template": "{% if %}"}, "--data.prompt-template is no Jinja"),
        ({"columns": ("input",)}, "'input', expected NAME=FIELD"),
        ({"columns": ("input=a", "input=b")}, "'input' is given twice"),
        ({"columns": ("input=a",), "input_key": "b"}, "'input' is given twice"),
    ],
)
def test_settings_that_no_row_could_go_with_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        formed({"input": "a", "output": "b"}, **config)
