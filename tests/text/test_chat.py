"""Chat templates: texts, ids and masks as transformers has them, and what each turn shows."""

import json
import zlib
from pathlib import Path
from typing import Any

import chat_cases
import pytest
import tiny
from chat_templates import TEMPLATES

from qlora_jax.config.data import DataConfig
from qlora_jax.data.forms import Example, Former
from qlora_jax.data.tokenize import Row, tokenize
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer, environment, limits
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.turns import examples_of

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "chat.json").read_text(encoding="utf-8")
)["cases"]
OURS_ALONE = {("idefics", row) for row in chat_cases.ROWS} - {("idefics", "parts")}
"""transformers renders a text as nothing, where a template takes parts alone."""


def opened(template: str, tokenizer: str = "byte-level") -> Tokenizer:
    raw = chat_cases.all_tokenizers()[tokenizer]
    return Tokenizer(
        raw,
        bos_id=raw.token_to_id("<s>"),
        eos_ids=(raw.token_to_id("</s>"),),
        chat_template=template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


def format_row(row: Any, config: DataConfig, tokenizer: Tokenizer) -> list[Any]:
    return Former(config, tokenizer)(row).examples


def rows_of(examples: list[Example], tokenizer: Tokenizer) -> list[Row]:
    return tokenize(examples, tokenizer, DataConfig())


def trained(examples: list[Any]) -> list[list[str]]:
    """What trains, of each example."""
    return [[e.text[s.start : s.end] for s in e.spans if s.weight] for e in examples]


def runs(weights: list[float]) -> list[list[int]]:
    found: list[list[int]] = []
    for i, weight in enumerate(weights):
        if not weight:
            continue
        if found and found[-1][1] == i:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1])
    return found


def crc(ids: list[int]) -> int:
    return zlib.crc32(",".join(map(str, ids)).encode())


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_and_tokenized_as_transformers_does(name):
    for row_name, golden in GOLDEN[name].items():
        if golden is None:
            continue
        row = chat_cases.row_of(row_name)
        text = opened(TEMPLATES[name]).chat(**row)
        assert text == golden["text"], row_name
        for kind, (count, sum_) in golden["ids"].items():
            ids = opened(TEMPLATES[name], kind).encode(text)
            assert (len(ids), crc(ids)) == (count, sum_), (row_name, kind)


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_transformers_or_follow_the_prompts_that_it_shows(name):
    for row_name, golden in GOLDEN[name].items():
        if golden is None or (name, row_name) in OURS_ALONE:
            continue
        tokenizer = opened(TEMPLATES[name])
        if row_name == "parts" and tokenizer.template().contents != "either":
            continue  # transformers prints the objects, or nothing
        examples = format_row(chat_cases.row_of(row_name), DataConfig(), tokenizer)
        if "mask" in golden:
            assert [e.text for e in examples] == [golden["text"]]
            for kind, mask in golden["mask"].items():
                (row,) = rows_of(examples, opened(TEMPLATES[name], kind))
                assert runs(row.weights.tolist()) == mask, (row_name, kind)
            continue
        shown = [e.text[: s.start] for e in examples for s in e.spans]
        if (name, row_name) not in DROPPED_PROMPTS:
            assert shown == golden["prompts"], row_name
        if len(examples) == 1 and examples[0].text != golden["text"]:
            # The prompt holds what the rendered answer does not.
            assert not golden["text"].startswith(golden["prompts"][0])
        for kind in golden["ids"]:
            for row, example in zip(
                rows_of(examples, opened(TEMPLATES[name], kind)), examples, strict=True
            ):
                assert crc(row.tokens.tolist()) == crc(
                    opened(TEMPLATES[name], kind).encode(example.text)
                )


DROPPED_PROMPTS = {("qwen3.5", "thoughts"), ("qwen3.5", "thoughts in the text")}
"""Their prompt says that there is no thought, and the rows have some."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_transformers_cannot_render_is_rendered_or_refused_with_a_reason(name):
    for row_name, golden in GOLDEN[name].items():
        if golden is not None:
            continue
        row, tokenizer = chat_cases.row_of(row_name), opened(TEMPLATES[name])
        if row_name == "parts":  # as the same row without parts
            joined = chat_cases.turns("Name it", "Blue")
            wanted = format_row({"messages": joined}, DataConfig(), tokenizer)
            assert format_row(row, DataConfig(), tokenizer) == wanted
        elif row_name == "tools" and name not in REFUSE_TOOLS:  # content null is empty
            assert format_row(row, DataConfig(), tokenizer)[-1].spans
        else:
            with pytest.raises(DataError, match="the chat template refuses the mess"):
                format_row(row, DataConfig(), tokenizer)


REFUSE_TOOLS = ("llama2", "mistral 0.1", "gemma", "idefics")
"""Roles have to alternate, or a content has to have a first part."""


def test_at_least_forty_constructs_are_compared():
    assert len(TEMPLATES) >= 40
    assert (
        sum(case is not None for rows in GOLDEN.values() for case in rows.values())
        > 300
    )


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("chatml", "two turns", [["Blue.<|im_end|>\n", "Red, naïve \U0001f642<|im_end|>\n"]]),
        (
            "qwen3",
            "thoughts",
            [
                ["<think>\nhm\n</think>\n\nb<|im_end|>\n"],
                ["<think>\nso\n</think>\n\nd<|im_end|>\n"],
            ],
        ),
        (
            "qwen3 2507",
            "thoughts in the text",
            [["hm\n</think>\n\nb<|im_end|>\n"], ["so\n</think>\n\nd<|im_end|>\n"]],
        ),
        (
            "qwen3.5",
            "thoughts",
            [["hm\n</think>\n\nb<|im_end|>\n"], ["so\n</think>\n\nd<|im_end|>\n"]],
        ),
        ("phi3", "one turn", [["Blue is one.<|end|>\n</s>"]]),
        (
            "phi3",
            "two turns",
            [["Blue.<|end|>\n</s>"], ["Red, naïve \U0001f642<|end|>\n</s>"]],
        ),
        ("r1 distill", "one turn", [["Blue is one.</s>"]]),
        (
            "r1 distill",
            "thoughts in the text",
            [["hm\n</think>\n\nb</s>"], ["so</think>\n\nd</s>"]],
        ),
        ("nemotron", "one turn", [["</think>Blue is one.<|im_end|>\n"]]),
        ("deepseek v3.1", "one turn", [["Blue is one.</s>"]]),
        ("llama2", "one turn", [[" Blue is one. </s>"]]),
        ("gpt oss", "two turns", [
            ["<|final|>Blue.<|return|>"], ["<|final|>Red, naïve \U0001f642<|return|>"],
        ]),
        ("idefics", "one turn", [[" Blue is one.<|end|>\n"]]),
        ("glm4", "one turn", [["\nBlue is one."]]),
        ("mistral 0.3", "three turns, system", [[" b</s>"], [" d</s>"], [" f\n\ng</s>"]]),
        (
            "qwen2.5",
            "tools",
            [
                [
                    '<call>{"name": "weather", "arguments": {"at": "Ulm"}}</call><|im_end|>\n',
                    "It is 42.<|im_end|>\n",
                ]
            ],
        ),
    ],
)  # fmt: skip
def test_what_trains_of_a_conversation(name, row, wanted):
    examples = format_row(chat_cases.row_of(row), DataConfig(), opened(TEMPLATES[name]))
    assert trained(examples) == wanted


@pytest.mark.parametrize("kind", ["sentencepiece", "legacy"])
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama2", {"sentencepiece": "_Blue", "legacy": "_"}),
        ("mistral 0.1", {"sentencepiece": "Blue", "legacy": "_Blue"}),
        ("zephyr", {"sentencepiece": "Blue", "legacy": "Blue"}),
        ("vicuna", {"sentencepiece": "_Blue", "legacy": "_Blue"}),
    ],
)
def test_an_answer_begins_with_the_token_that_it_has_in_the_text(kind, name, first):
    tokenizer = opened(TEMPLATES[name], kind)
    row = {"messages": chat_cases.turns("Name a", "Blue is one.", "Another", "Blue")}
    examples = format_row(row, DataConfig(), tokenizer)
    (made,) = rows_of(examples, tokenizer)
    assert made.tokens.tolist() == tokenizer.encode(examples[0].text)
    begins = [first_ for first_, _ in runs(made.weights.tolist())]
    found = [tokenizer.token_of(int(made.tokens[i])) for i in begins]
    assert found == [first[kind].replace("_", chat_cases.SPACE)] * 2
    assert made.answer.strip() == "Blue"


# --- weights


def weighted(*weights: float) -> list[dict[str, Any]]:
    messages = chat_cases.turns("a", "b", "c", "d")
    return [m | {"weight": w} if m["role"] == "assistant" else m
            for m, w in zip(messages, [0, weights[0], 0, weights[1]], strict=True)]  # fmt: skip


@pytest.mark.parametrize("name", ["chatml", "marks", "phi3"])
def test_a_turn_of_weight_zero_does_not_train(name):
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    both = trained(examples_of(weighted(1, 1), template))
    texts = [text for texts in both for text in texts]
    assert len(texts) == 2
    last = examples_of(weighted(0, 1), template)
    assert [t for texts in trained(last) for t in texts] == texts[1:]
    first = examples_of(weighted(1, 0), template)
    assert [t for texts in trained(first) for t in texts] == texts[:1]
    half = examples_of(weighted(0.5, 1), template)
    assert [s.weight for e in half for s in e.spans] == [0.5, 1.0]


def test_a_weight_of_zero_silences_every_mark_of_its_turn():
    template = ChatTemplate(TEMPLATES["two marks a turn"])
    messages = chat_cases.row_of("thoughts")["messages"]
    messages[1]["weight"] = 0
    (example,) = examples_of(messages, template)
    assert trained([example]) == [["<think>so</think>", "d<|im_end|>"]]


@pytest.mark.parametrize("weight", [-1, "1", True, float("inf")])
def test_other_weights_are_refused(weight):
    messages = chat_cases.turns("a", "b")
    messages[1]["weight"] = weight
    with pytest.raises(DataError, match="'weight' of a message is"):
        format_row({"messages": messages}, DataConfig(), opened(TEMPLATES["chatml"]))


# --- variables and fields


def test_rows_set_the_templates_variables():
    template = "{{ style }}{{ more }}{% if tools %}T{% endif %}" + TEMPLATES["chatml"]
    row = {
        "messages": chat_cases.turns("a", "b"),
        "style": "s",
        "chat_template_kwargs": {"more": "m"},
        "tools": json.dumps([chat_cases.TOOL]),
    }
    (example,) = format_row(row, DataConfig(), opened(template))
    assert example.text.startswith("smT<|im_start|>user")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": "no"}, "'tools' is a text, and no JSON"),
        ({"tools": {"a": 1}}, "'tools' is no list of objects"),
        ({"documents": [1]}, "'documents' is no list of objects"),
        ({"chat_template_kwargs": []}, "'chat_template_kwargs' is list"),
    ],
)
def test_variables_of_another_type_are_refused(more, message):
    row = {"messages": chat_cases.turns("a", "b"), **more}
    with pytest.raises(DataError, match=message):
        format_row(row, DataConfig(), opened(TEMPLATES["chatml"]))


def test_fields_that_the_template_does_not_read_are_found():
    row = chat_cases.row_of("tools")
    row["messages"][0]["name"] = "Eva"
    formed = Former(DataConfig(), opened(TEMPLATES["solar"]))(row)
    assert formed.unread == {"tools", "tool_calls", "tool_call_id", "name"}
    thoughts = Former(DataConfig(), opened(TEMPLATES["qwen3"]))
    assert not thoughts(chat_cases.row_of("thoughts")).unread


def test_parts_that_are_no_text_are_refused():
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        *chat_cases.turns("a", "b"),
    ]
    with pytest.raises(DataError, match="a part of type 'image'; only parts of text"):
        format_row({"messages": messages}, DataConfig(), opened(TEMPLATES["chatml"]))


# --- limits

_GROWN = (
    "{{% set ns = namespace(t='a') %}}{{% for i in range(99) %}}"
    "{{% set ns.t = {} %}}{{% endfor %}}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "more than 20000 steps"),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}"
         "{{ f(60) }}", "more than 20000 steps"),
        ("{{ 'a' * 999999999 }}", "may make a value"),
        ("{{ 'a'.center(999999999) }}", "may make a value"),
        ("{{ 'a' | center(999999999) }}", "may make a value"),
        ("{{ '%999999999d' % 1 }}", "may make a value"),
        ("{{ '%*d' % (999999999, 1) }}", "may make a value"),
        ("{{ '{:>999999999}'.format(1) }}", "may make a value"),
        ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "may make a value"),
        ("{{ (['a'] * 99999) | join('b' * 99999) }}", "may make a value|20000 steps"),
        ("{{ [1] | slice(999999999) | list }}", "may make a value"),
        ("{{ messages | tojson(indent=999999999) }}", "may make a value"),
        ("{{ ([[1]] * 99999) | sum(start=[]) }}", "may make a value|20000 steps"),
        ("{{ 9 ** 99999999 }}", "a number of over"),
        (_GROWN.format("ns.t ~ ns.t"), "a value of over|20000 steps"),
        (_GROWN.format("ns.t + ns.t"), "a value of over|20000 steps"),
        (_GROWN.format("[ns.t, ns.t]"), "a value of over|20000 steps"),
        (_GROWN.format("'%s%s' % (ns.t, ns.t)"), "a value of over|20000 steps"),
        ("{% set ns = namespace(t='a') %}{% for i in range(99) %}{% set ns.t %}{{ ns.t }}"
         "{{ ns.t }}{% endset %}{% endfor %}", "characters"),
        ("{% set ns = namespace(t=9) %}{% for i in range(99) %}"
         "{% set ns.t = ns.t * ns.t %}{% endfor %}", "a number of over"),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "characters|20000 steps"),
        ("{% set x %}{% for a in range(9999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
         "characters"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "cannot be compiled|recursion"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled"),
        ("a" * 300_000, "300000 characters, expected at most"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% set x = namespace(__class__=1) %}", "sets '__class__' on a namespace"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
    ],
)  # fmt: skip
def test_templates_that_do_not_end_or_reach_out_are_stopped(
    template, message, monkeypatch
):
    monkeypatch.setattr(limits, "MAX_STEPS", 20_000)
    with pytest.raises(DataError, match=f"refuses the messages: .*{message}"):
        ChatTemplate(template).render(chat_cases.turns("a"))


def test_a_template_that_was_stopped_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(limits, "MAX_STEPS", 100)
    made = ChatTemplate("{% for a in range(messages[0].content | int) %}{% endfor %}b")
    assert made.render(chat_cases.turns("3")) == "b"
    with pytest.raises(DataError, match="more than 100 steps"):
        made.render(chat_cases.turns("999"))
    with pytest.raises(DataError, match="was stopped before: .*more than 100 steps"):
        made.render(chat_cases.turns("3"))


def test_a_template_is_compiled_once():
    compiled = environment.compiled
    before = compiled.cache_info().misses
    for text in "abc":
        ChatTemplate("{{ messages[0].content }} once").render(chat_cases.turns(text))
    assert compiled.cache_info().misses == before + 1


# --- what ends a turn


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("phi3", "<|end|>"), ("llama3", "<|eot_id|>"),
     ("gemma", "<end_of_turn>"), ("llama2", "</s>"), ("gpt oss", "<|return|>"),
     ("solar", None)],
)  # fmt: skip
def test_the_token_that_ends_a_turn_stops_a_chat(name, end):
    tokenizer = opened(TEMPLATES[name])
    ends = () if end is None else (tokenizer.id_of(end),)
    assert tokenizer.chat_ends == ends
    assert tokenizer.stop_ids == tuple(dict.fromkeys((*tokenizer.eos_ids, *ends)))


def test_messages_begin_with_an_assistants_turn(caplog):
    messages = [{"role": "assistant", "content": "Hi"}, *chat_cases.turns("a", "b")]
    examples = examples_of(messages, ChatTemplate(TEMPLATES["chatml"]))
    assert trained(examples) == [["Hi<|im_end|>\n", "b<|im_end|>\n"]]


def test_a_first_answer_of_tiny_rows_is_the_last_that_trains():
    tokenizer = tiny.tokenizer()
    row = {"messages": chat_cases.turns("a", "b", "c", "d")}
    (made,) = rows_of(format_row(row, DataConfig(), tokenizer), tokenizer)
    assert made.answer == "d" and made.chat
    assert tokenizer.decode(made.tokens[: made.prompt].tolist()) == "abc"
