"""JSONL to batches: what trains, what is refused, and the order of rows."""

import json
from pathlib import Path
from typing import Any

import chat_cases
import numpy as np
import pytest
import tiny
from chat_templates import TEMPLATES

from qlora_jax.data import DataConfig, Dataset, check_ids, load_dataset, read_dataset
from qlora_jax.data.fitting import taken
from qlora_jax.data.layout import padded_length
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.text import Tokenizer

BOS, EOS = tiny.BOS, tiny.EOS


def read(tmp_path: Path, *rows: Any, tokenizer: Any = None, **config: Any) -> Dataset:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    return read_dataset(path, tokenizer or tiny.tokenizer(), DataConfig(**config))


def text_of(row: Row, *, trained: bool) -> str:
    """Returns the text of the tokens that train, or of those that do not."""
    ids = row.tokens[(row.weights > 0) == trained]
    return tiny.tokenizer()._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"input": "2+2=", "output": "4"}, "<s>2+2=", "4</s>"),
        ({"input": "", "output": "4"}, "<s>", "4</s>"),
        ({"input": "2+2=", "output": ""}, "<s>2+2=", "</s>"),
        ({"text": "Once upon"}, "<s>", "Once upon</s>"),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            "<s>Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n",
            "4</s>",
        ),
        (
            {"instruction": "Say hi.", "output": "hi"},
            "<s>Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n"
            "### Response:\n",
            "hi</s>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            "<s><user>a<assistant><user>c<assistant>",
            "b</s>d</s>",
        ),
    ],
)
def test_the_answer_alone_trains(tmp_path, row, prompt, answer):
    (one,) = read(tmp_path, row).rows
    assert text_of(one, trained=False) == prompt
    assert text_of(one, trained=True) == answer
    assert one.tokens.dtype == np.int32 and one.weights.dtype == np.float32


def test_a_rows_prompt_and_answer_are_kept_for_evaluation(tmp_path):
    (row,) = read(tmp_path, {"input": "2+2=", "output": " 4"}).rows
    assert row.tokens[: row.prompt].tolist()[0] == BOS
    assert tiny.tokenizer().decode(row.tokens[: row.prompt].tolist()) == "2+2="
    assert row.answer == " 4"


def test_train_on_prompt_counts_everything_but_bos(tmp_path):
    (row,) = read(tmp_path, {"input": "ab", "output": "c"}, train_on_prompt=True).rows
    assert row.weights.tolist() == [0, 1, 1, 1, 1]
    assert row.prompt == 3


def test_a_model_without_bos_gets_none(tmp_path):
    tokenizer = tiny.tokenizer(bos=False)
    (row,) = read(tmp_path, {"input": "ab", "output": "c"}, tokenizer=tokenizer).rows
    assert len(row.tokens) == 4 and BOS not in row.tokens


def test_other_names_of_the_fields(tmp_path):
    rows = read(
        tmp_path,
        {"question": "2+2=", "answer": "4", "input": "not this"},
        input_key="question",
        output_key="answer",
    ).rows
    assert text_of(rows[0], trained=False) == "<s>2+2="
    assert rows[0].answer == "4"


def test_special_tokens_in_a_text_are_not_swallowed(tmp_path):
    (row,) = read(tmp_path, {"input": "naïve 🙂\n", "output": "ok"}).rows
    assert tiny.tokenizer().decode(row.tokens.tolist()) == "naïve 🙂\nok"


def test_every_bad_line_is_named_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"input": "a", "output": "b"})
    lines = [
        good,
        "not json",
        "",
        '{"input": "a"}',
        "[1]",
        '{"input": 3, "output": "b"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        "{}",
        good,
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_dataset(path, tiny.tokenizer(), DataConfig())
    message = str(caught.value)
    assert "(8 problems)" in message
    assert f"{path}:2: is not JSON" in message
    assert f"{path}:4: has 'input'; expected 'input' and 'output'" in message
    assert f"{path}:5: is list, expected an object" in message
    assert f"{path}:6: 'input' is int, expected a string" in message
    assert f"{path}:7: 'messages' is not a list" in message
    assert f"{path}:8: 'messages' has an entry without 'role' and 'content'" in message
    assert f"{path}:9: 'messages' has no assistant turn" in message
    assert f"{path}:10: has no keys" in message


def test_at_most_twenty_bad_lines_are_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, *[{f"wrong{i}": i} for i in range(25)])
    message = str(caught.value)
    assert "25 problems" in message and message.endswith("... and 5 more")
    assert message.count("rows.jsonl:") == 20


def test_problems_of_one_kind_are_one_line(tmp_path):
    rows = [{"question": "2+2=", "answer": "4", "id": i} for i in range(25)]
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"input": "a", "output": "b"}, *rows, {"text": 3}, "no object")
    message = str(caught.value)
    assert "(3 problems)" in message and message.count("rows.jsonl:") == 3
    assert "rows.jsonl:2: has 'question', 'answer', 'id'; expected" in message
    assert "--data.columns input=question output=answer (25 rows)" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"input": "\ud800", "output": "b"}', ":1: 'input' is no Unicode text"),
        ('{"a": ' + "[" * 100_000, ":1: is not JSON"),
        (
            '{"messages": [{"role": "user", "content": null},'
            ' {"role": "assistant", "content": "b"}]}',
            ":1: .*'content' is NoneType, expected a string",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"},'
            ' {"role": "assistant", "content": {"text": "b"}}]}',
            ":1: .*'content' is dict, expected a string",
        ),
        (
            '{"messages": [{"role": 1, "content": "a"},'
            ' {"role": "assistant", "content": "b"}]}',
            ":1: .*'role' is int, expected a string",
        ),
    ],
    ids=["lone surrogate", "deep nesting", "null content", "dict content", "int role"],
)
def test_odd_json_is_named_too(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "rows.jsonl", tiny.tokenizer(), DataConfig())


def test_messages_need_a_chat_template(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=r":1: .*has no chat template.*'input'"):
        read(tmp_path, row, tokenizer=tiny.tokenizer(chat=False))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses.*roles must alternate",
        ),
        ("{% for m in messages %}", "refuses the messages"),
        ("{{ messages | length }}", "renders earlier turns differently"),
        ("{{ messages[0]['content'] + 1 }}", "refuses the messages"),
    ],
    ids=["raises", "syntax", "rewrites", "type error"],
)
def test_a_template_that_cannot_be_used_says_so(tmp_path, template, message):
    from qlora_jax.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(tiny.byte_tokenizer(), chat_template=template)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"messages": turns}, tokenizer=tokenizer)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        read_dataset(tmp_path / "rows.jsonl", tiny.tokenizer(), DataConfig())


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(DataError, match=f"{path} is no file"):
        read_dataset(path, tiny.tokenizer(), DataConfig())


LONG = ({"input": "a", "output": "b"}, {"input": "aaaa", "output": "bbbbbb"})
"""Rows of 4 and 12 tokens, BOS and EOS included."""


def test_a_row_too_long_is_an_error_that_counts_and_names(tmp_path):
    message = (
        r"1 of 2 rows of .* are longer than --data\.max-tokens 11[\s\S]*:2: 12 tokens"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path, *LONG, max_tokens=11)
    assert len(read(tmp_path, *LONG, max_tokens=12)) == 2


def test_a_row_too_long_is_dropped_when_asked(tmp_path, caplog):
    dataset = read(tmp_path, *LONG, max_tokens=8, too_long="drop")
    assert [len(row.tokens) for row in dataset.rows] == [4]
    assert dataset.dropped == 1
    assert "1 rows over 8 tokens were left out" in caplog.text


def test_a_row_too_long_is_truncated_when_asked(tmp_path, caplog):
    dataset = read(tmp_path, *LONG, max_tokens=8, too_long="truncate")
    assert [len(row.tokens) for row in dataset.rows] == [4, 8]
    assert text_of(dataset.rows[1], trained=True) == "bbb"
    assert dataset.dropped == 0
    assert "1 rows over 8 tokens were cut" in caplog.text


@pytest.mark.parametrize("count", [12, 13, 25, 37])
def test_a_split_row_keeps_every_token_and_weight(tmp_path, caplog, count):
    row = {"input": "aaaa", "output": "b" * (count - 6)}
    whole = read(tmp_path, LONG[0], row).rows
    parts = read(tmp_path, LONG[0], row, max_tokens=12, too_long="split").rows
    assert len(parts) == 1 + -(-count // 12)
    sizes = [len(part.tokens) for part in parts[1:]]
    assert max(sizes) <= 12 and max(sizes) - min(sizes) <= 1
    for name in ("tokens", "weights"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, name) for part in parts]),
            np.concatenate([getattr(one, name) for one in whole]),
        )
    assert [part.answer for part in parts[1:]] == [whole[1].answer] + [""] * (
        len(parts) - 2
    )
    assert [part.prompt for part in parts[1:]] == [5] + [0] * (len(parts) - 2)
    assert ("1 rows over 12 tokens were split" in caplog.text) == (count > 12)


def test_parts_of_a_prompt_are_left_out_and_counted(tmp_path, caplog):
    row = {"input": "a" * 20, "output": "b" * 8}  # 30 tokens
    dataset = read(tmp_path, row, max_tokens=10, too_long="split")
    assert [len(part.tokens) for part in dataset.rows] == [10]
    assert text_of(dataset.rows[0], trained=True) == "b" * 8 + "</s>"
    assert dataset.dropped == 2
    assert (
        "2 rows, or parts of rows, with nothing to learn were left out" in caplog.text
    )


def beside(row: Row, other: Row | None, **extras: Any) -> Row:
    return row._replace(other=other, extras=extras)


def test_a_pair_is_as_long_as_its_longer_row():
    one, long = tiny.rows([6, 12]).rows
    named = {"by_token": np.arange(6), "by_row": np.float32(1)}
    pair = beside(one, long, **named)
    configs = (
        DataConfig(max_tokens=12, too_long="drop"),
        DataConfig(max_tokens=11, too_long="drop"),
        DataConfig(max_tokens=4, too_long="truncate"),
    )
    keep, drop, cut = (taken([pair, one], "a", config) for config in configs)
    assert (len(keep.rows), keep.long) == (2, 0)
    assert drop.rows == [one] and drop.long == 1
    assert cut.cut == 2
    (first, _) = cut.rows
    assert first.tokens.tolist() == one.tokens[:4].tolist()
    assert first.other is not None
    assert first.other.tokens.tolist() == long.tokens[:4].tolist()
    assert first.extras["by_token"].tolist() == [0, 1, 2, 3]
    assert first.extras["by_row"] == 1


def test_rows_that_count_as_a_whole_are_not_split():
    one, long = tiny.rows([6, 12]).rows
    split = DataConfig(max_tokens=10, too_long="split")
    wrong = {"pairs": beside(one, long), "rows with 'kind'": beside(long, None, kind=1)}
    for what, row in wrong.items():
        with pytest.raises(DataError, match=f"a: {what} count as a whole and cannot"):
            taken([one, row], "a", split)
    by_token = beside(long, None, kind=np.arange(12))
    parts = taken([one, by_token], "a", split).rows[1:]
    assert [part.extras["kind"].tolist() for part in parts] == [
        list(range(6)),
        list(range(6, 12)),
    ]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_nothing_left_to_learn_is_an_error(tmp_path, too_long):
    row = {"input": "aaaaaaaaaa", "output": "b"}
    with pytest.raises(DataError, match=r"no row has a token to learn within 6 tokens"):
        read(tmp_path, row, row, max_tokens=6, too_long=too_long)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_tokens": 1}, "--data.max-tokens is 1, expected at least 2"),
        ({"eval_rows": -1}, "--data.eval-rows is -1, expected 0 or more"),
    ],
)
def test_a_wrong_data_config_names_the_flag(config, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**config)


def test_padding_is_on_the_right_and_weighs_nothing():
    dataset = tiny.rows([9, 4])
    batch = dataset.pad(dataset.rows, 2)
    np.testing.assert_array_equal(batch["tokens"][1, :4], dataset.rows[1].tokens)
    assert not batch["tokens"][1, 4:].any() and not batch["weights"][1, 4:].any()


@pytest.mark.parametrize(
    ("longest", "max_tokens", "padded"),
    [(3, 1024, 32), (64, 1024, 64), (65, 1024, 96), (256, 1024, 256), (257, 1024, 384),
     (600, 1024, 768), (1000, 1024, 1024), (20, 20, 20), (90, 100, 96), (30, 20, 30)],
)  # fmt: skip
def test_padded_length(longest, max_tokens, padded):
    assert padded_length(longest, max_tokens) == padded


def test_padded_lengths_are_few_and_never_short():
    lengths = [padded_length(n, 4096) for n in range(1, 4097)]
    assert all(length >= n for n, length in enumerate(lengths, 1))
    assert all(length <= max(64, 1.5 * n + 64) for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) < 30


def test_split_holds_rows_out_by_the_seed(tmp_path):
    dataset = tiny.rows(range(3, 23))
    rest, held = dataset.split(5, seed=1)
    assert (len(rest), len(held)) == (15, 5)
    ids = [row.tokens.tobytes() for row in (*rest.rows, *held.rows)]
    assert sorted(ids) == sorted(row.tokens.tobytes() for row in dataset.rows)
    again = dataset.split(5, seed=1)[1]
    assert [len(row.tokens) for row in again.rows] == [len(r.tokens) for r in held.rows]
    other = dataset.split(5, seed=2)[1]
    assert [len(row.tokens) for row in other.rows] != [len(r.tokens) for r in held.rows]
    with pytest.raises(DataError, match="--data.eval-rows 20 leaves nothing"):
        dataset.split(20, seed=0)


def test_split_still_says_how_many_rows_were_dropped(tmp_path):
    short = [{"input": "a", "output": letter} for letter in "bcdef"]
    dataset = read(tmp_path, *short, LONG[1], max_tokens=8, too_long="drop")
    assert dataset.split(2, seed=0)[0].dropped == 1


def test_rows_cut_down_to_their_prompt_are_left_out_and_counted(tmp_path, caplog):
    # A held-out part of such rows alone would have a loss of 0 / 0.
    rows = [{"input": "aaaaaaaaaa", "output": "b"} for _ in range(6)]
    rows.append({"input": "a", "output": "b"})
    dataset = read(tmp_path, *rows, max_tokens=6, too_long="truncate")
    assert len(dataset) == 1 and dataset.dropped == 6
    assert "6 rows with nothing to learn" in caplog.text


def test_load_dataset_yields_whole_epochs_and_fails_at_once(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(7))
    batches = list(load_dataset(path, tiny.tokenizer(), 4, 32, epochs=2))
    assert len(batches) == 4
    assert {b["tokens"].shape for b in batches} == {(4, 32)}
    with pytest.raises(DataError, match="longer than --data.max-tokens 5"):
        load_dataset(path, tiny.tokenizer(), batch_size=4, max_tokens=5)


def test_load_dataset_reads_the_rows_of_an_objective(tmp_path):
    rows = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no"} for i in range(6)]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    batches = list(load_dataset(path, tiny.tokenizer(), 2, 32, kind="pairs"))
    assert [batch["tokens"].shape[0] for batch in batches] == [4, 4, 4]
    said = [tiny.tokenizer().decode(row.tolist()) for row in batches[0]["tokens"]]
    assert ["yes" in text for text in said] == [True, False, True, False]
    with pytest.raises(DataError):
        load_dataset(path, tiny.tokenizer(), 2, 32)


def test_batch_sizes_below_one_are_refused(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(7))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        load_dataset(path, tiny.tokenizer(), batch_size=0)


# --- whole texts


def opened(kind: str, **settings: Any) -> Tokenizer:
    raw = chat_cases.all_tokenizers()[kind]
    bos, eos = raw.token_to_id("<s>"), raw.token_to_id("</s>")
    return Tokenizer(raw, **({"bos_id": bos, "eos_ids": (eos,)} | settings))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "legacy"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("Name a color:", " Blue"), ("Name", " is"), ("(", "Blue)")]
)
def test_prompt_and_answer_are_tokenized_together(tmp_path, kind, prompt, answer):
    tokenizer = opened(kind)
    row = {"input": prompt, "output": answer}
    (made,) = read(tmp_path, row, tokenizer=tokenizer).rows
    whole = [tokenizer.bos_id, *tokenizer.encode(prompt + answer), tokenizer.eos_ids[0]]
    asked = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    assert made.tokens.tolist() == whole
    assert whole[: made.prompt] == asked and made.answer == answer
    assert made.weights.tolist() == [0.0] * len(asked) + [1.0] * (
        len(whole) - len(asked)
    )


def test_a_space_before_the_answer_goes_with_its_first_word(tmp_path):
    tokenizer = opened("sentencepiece")
    row = {"input": "Name: ", "output": "Blue"}
    (made,) = read(tmp_path, row, tokenizer=tokenizer).rows
    assert made.tokens.tolist()[1:-1] == tokenizer.encode("Name: Blue")
    first = tokenizer.token_of(int(made.tokens[made.prompt]))
    assert first == f"{chat_cases.SPACE}Blue"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_no_token_holds_letters_of_prompt_and_answer(tmp_path, kind):
    tokenizer = opened(kind)
    (made,) = read(
        tmp_path, {"input": "a Bl", "output": "ue"}, tokenizer=tokenizer
    ).rows
    asked = [tokenizer.bos_id, *tokenizer.encode("a Bl")]
    assert made.tokens[: made.prompt].tolist() == asked
    assert tokenizer.token_of(int(made.tokens[made.prompt])) == "ue"
    assert made.weights.sum() == 2


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "ab"}, "ab</s>"),
        ({"text": "<s>ab</s>"}, "<s>ab</s>"),
        ({"input": "<s>a", "output": "b</s>"}, "<s>ab</s>"),
        ({"input": "a", "output": "b"}, "<s>ab</s>"),  # as qlora.py
    ],
)
def test_a_text_gets_bos_where_its_tokenizer_puts_one_and_nothing_twice(
    tmp_path, row, wanted
):
    (made,) = read(tmp_path, row, tokenizer=opened("byte-level", before=())).rows
    raw = chat_cases.all_tokenizers()["byte-level"]
    assert raw.decode(made.tokens.tolist(), skip_special_tokens=False) == wanted
    assert made.weights[-1] == 1


def test_what_the_tokenizer_adds_around_a_text_is_added(tmp_path):
    tokenizer = opened("byte-level", before=(7, 8), after=(9,), eos_ids=())
    (made,) = read(tmp_path, {"text": "a"}, tokenizer=tokenizer).rows
    assert made.tokens.tolist() == [7, 8, *tokenizer.encode("a"), 9]
    assert made.weights.tolist() == [0, 0, 1, 1]


def test_rows_that_end_without_eos_are_said_once(tmp_path, caplog):
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c</s>"}]
    read(tmp_path, *rows, tokenizer=opened("byte-level", eos_ids=()))
    assert caplog.text.count("rows end without an end-of-text token") == 1
    assert "3 of 3 rows" in caplog.text and "names none (eos_token)" in caplog.text


def test_a_chat_end_that_is_no_eos_is_said_once(tmp_path, caplog):
    tokenizer = opened("byte-level", chat_template=TEMPLATES["chatml"])
    row = {"messages": chat_cases.turns("a", "b")}
    (first, _) = read(tmp_path, row, row, tokenizer=tokenizer).rows
    assert first.answer == "b"
    assert caplog.text.count("ends in '<|im_end|>', which is none of the model's") == 1


def test_fields_that_no_template_reads_are_said_once(tmp_path, caplog):
    tokenizer = opened("byte-level", chat_template=TEMPLATES["chatml"])
    row = {"messages": chat_cases.turns("a", "b"), "tools": [chat_cases.TOOL]}
    read(tmp_path, row, row, {**row, "tools": []}, tokenizer=tokenizer)
    assert caplog.text.count("does not read") == 1
    assert "2 rows have 'tools', which the chat template does not read" in caplog.text


def test_a_conversation_can_become_several_rows(tmp_path):
    special = {"eos_token": "</s>"}
    tokenizer = opened(
        "byte-level", chat_template=TEMPLATES["phi3"], special_tokens=special
    )
    row = {"messages": chat_cases.turns("a", "b", "c", "d")}
    one, other = read(tmp_path, row, tokenizer=tokenizer).rows
    assert (one.answer, other.answer) == ("b", "d")
    with pytest.raises(DataError, match=r"1 of 2 rows of .* longer[\s\S]*:1: "):
        read(tmp_path, row, tokenizer=tokenizer, max_tokens=len(one.tokens))


def test_a_chat_template_can_be_chosen(tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{{ messages[0].content }}!" + TEMPLATES["chatml"]
    )
    row = {"messages": chat_cases.turns("a", "b")}
    for choice in (str(tmp_path / "own.jinja"), "short"):
        tokenizer = opened(
            "byte-level",
            chat_template={"default": "x", "short": "a!" + TEMPLATES["chatml"]},
        )
        (made,) = read(tmp_path, row, tokenizer=tokenizer, chat_template=choice).rows
        assert tokenizer.decode(made.tokens.tolist()).startswith("a!user\na\n")
    with pytest.raises(ConfigError, match="--data.chat-template long is no file"):
        read(tmp_path, row, tokenizer=tokenizer, chat_template="long")


def test_ids_beyond_the_embedding_are_named_with_their_number(tmp_path):
    tokenizer = opened("byte-level")
    rows = read(tmp_path, {"text": "ab"}, {"text": "a"}, tokenizer=tokenizer).rows
    size = tokenizer.rows
    check_ids(rows, tokenizer, size)
    with pytest.raises(DataError) as refused:
        check_ids(rows, tokenizer, 256)
    message = str(refused.value)
    assert "2 of 2 rows have ids that the model's embedding of 256 rows" in message
    assert f"id {tokenizer.eos_ids[0]} ('</s>'), 2 times" in message
