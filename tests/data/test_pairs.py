"""Rows of preferences, judged rows, rows with a teacher: forms, tokens, refusals, the cache."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_jax.config.objective import Rows
from qlora_jax.data import DataConfig, cache, read_dataset
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError

USER = {"role": "user", "content": "hi"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, rows: list[Any], kind: Any = "pairs", **config: Any) -> Any:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    return read_dataset(path, tiny.tokenizer(), DataConfig(**config), kind=kind)


def shown(row: Row) -> str:
    """A row's text, with a bar where its answer begins."""
    start = int(np.argmax(row.weights > 0))
    assert row.weights[start:].all() and not row.weights[:start].any()
    texts = (
        tiny.tokenizer().text_of(x.tolist()) for x in np.split(row.tokens, [start])
    )
    return "|".join(texts)


CHAT = ("<s><user>hi<assistant>|yes</s>", "<s><user>hi<assistant>|no</s>")
FORMS = {
    "texts": ({"prompt": "q: ", "chosen": "yes", "rejected": "no"},
              ("<s>q: |yes</s>", "<s>q: |no</s>")),
    "an input": ({"input": "q: ", "chosen": "yes", "rejected": "no"},
                 ("<s>q: |yes</s>", "<s>q: |no</s>")),
    "messages": ({"prompt": [USER], "chosen": [said("yes")], "rejected": [said("no")]}, CHAT),
    "a message": ({"messages": [USER], "chosen": said("yes"), "rejected": said("no")}, CHAT),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}],
                  "chosen": {"from": "gpt", "value": "yes"},
                  "rejected": {"from": "gpt", "value": "no"}}, CHAT),
    "answers as texts": ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, CHAT),
    "a text and turns": ({"prompt": "hi", "chosen": [said("yes")], "rejected": [said("no")]},
                         CHAT),
    "the prompt again": ({"prompt": [USER], "chosen": [USER, said("yes")],
                          "rejected": [USER, said("no")]}, CHAT),
    "conversations": ({"chosen": [USER, said("yes")], "rejected": [USER, said("no")]}, CHAT),
    "conversations and a text": ({"prompt": "hi", "chosen": [USER, said("yes")],
                                  "rejected": [USER, said("no")]}, CHAT),
    "texts that begin alike": ({"chosen": "Q: why? A: because", "rejected": "Q: why? A: bees"},
                               ("<s>Q: why? A:| because</s>", "<s>Q: why? A:| bees</s>")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_two_rows_of_one_prompt(form: str, tmp_path: Path):
    row, wanted = FORMS[form]
    made, _ = read(
        tmp_path, [row, row]
    ).rows  # one row alone might be a file's one object
    assert made.other is not None
    assert (shown(made), shown(made.other)) == wanted


def test_alpacas_prompt_and_a_template_and_a_turn_make_pairs(
    tmp_path: Path, caplog: Any
):
    row = {"instruction": "Add.", "input": "1 1", "chosen": "2", "rejected": "3"}
    (made,) = read(tmp_path, [{**row, "output": "two"}]).rows
    assert shown(made).endswith("### Input:\n1 1\n\n### Response:\n|2</s>")
    assert "'output' (1 row)" in caplog.text
    (made,) = read(
        tmp_path, [row], prompt_template="{{ instruction }} {{ input }}="
    ).rows
    assert shown(made.other) == "<s>Add. 1 1=|3</s>"
    named = {"q": "hi", "good": "yes", "bad": "no"}
    columns = ("prompt=q", "chosen=good", "rejected=bad")
    (made,) = read(tmp_path, [named], columns=columns, chat=True).rows
    assert (shown(made), shown(made.other)) == CHAT


def test_prompts_train_beside_the_preference_where_they_are_to(tmp_path: Path):
    row = {"prompt": "q: ", "chosen": "yes", "rejected": "no"}
    (made,) = read(tmp_path, [row], train_on_prompt=True).rows
    assert shown(made) == "<s>q: |yes</s>"
    for one in (made, made.other):
        assert np.array_equal(one.extras["prompt_weights"], one.weights == 0)


PAIR = {"prompt": "q: ", "chosen": "yes", "rejected": "no"}
REFUSED = {
    "pairs": (
        ({**PAIR, "rejected": "yes"}, "the same answer as 'chosen' and 'rejected'"),
        ({**PAIR, "chosen": " "}, "has an empty 'chosen' answer"),
        ({**PAIR, "rejected": []}, "has an empty 'rejected' answer"),
        ({"prompt": [USER], "chosen": [said("")], "rejected": [said("a")]}, "empty 'chosen'"),
        ({"chosen": "yes", "rejected": "no"}, "answers that do not begin alike"),
        ({"chosen": "yes sir", "rejected": "yes sir and so on"}, "only goes on from"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "do not begin alike"),
        ({"chosen": [USER], "rejected": [USER, said("b")]}, "only goes on from"),
        ({"input": "a", "output": "b"}, "takes pairs.*--objective sft"),
        ({"prompt": "a", "completion": "b", "label": True}, "judged row.*--objective kto"),
        ({**PAIR, "chosen": 3}, "'chosen' is int"),
    ),
    "judged": (
        ({"prompt": "a", "completion": "b"}, "no 'label'.*--objective kto takes"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "neither true nor false"),
    ),
    "texts": (
        (PAIR, "preference row.*--objective dpo.*completion=chosen"),
        ({"prompt": "a", "completion": "b", "label": False}, "judged row.*objective kto"),
    ),
    "teacher": (
        ({"input": "a", "output": "b"}, "--objective distill takes 'input_ids'"),
        ({"input_ids": [1, 2], "teacher_ids": [[1]], "teacher_logprobs": [[-1.0]]},
         "another number of tokens"),
        ({"input_ids": [1], "teacher_ids": [[1, 2]], "teacher_logprobs": [[-1.0]]},
         "different sizes"),
        ({"input_ids": [1], "teacher_ids": [[1, 1]], "teacher_logprobs": [[-1.0, -2.0]]},
         "a token twice"),
        ({"input_ids": [1], "teacher_ids": [[1, 2]], "teacher_logprobs": [[-0.1, 0.0]]},
         "no log-probabilities"),
        ({"input_ids": [1], "teacher_ids": [1], "teacher_logprobs": [[-1.0]]},
         "'teacher_ids' is no table"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [(kind, *case) for kind, some in REFUSED.items() for case in some],
)
def test_a_row_that_an_objective_cannot_take_is_named(
    kind: str, row: Any, message: str, tmp_path: Path
):
    with pytest.raises(DataError) as error:
        read(tmp_path, [row, row], kind)
    text = str(error.value)
    assert re.search(message, text) and "(2 rows)" in text and "(1 problem)" in text


def test_pairs_that_differ_beyond_the_length_alone(tmp_path: Path):
    long = {"prompt": "q: ", "chosen": "yes", "rejected": "no" + 20 * "!"}
    with pytest.raises(
        DataError, match="1 of 2 rows .* longer than --data.max-tokens 12"
    ):
        read(tmp_path, [PAIR, long], max_tokens=12)
    assert len(read(tmp_path, [PAIR, long], max_tokens=12, too_long="drop")) == 1
    made = read(tmp_path, [PAIR, long], max_tokens=12, too_long="truncate").rows[1]
    assert (shown(made), shown(made.other)) == ("<s>q: |yes</s>", "<s>q: |no!!!!!!")
    with pytest.raises(DataError, match="cannot be split"):
        read(tmp_path, [PAIR, long], max_tokens=12, too_long="split")


def test_judged_rows_have_answers_to_other_prompts_beside_them(tmp_path: Path):
    rows = [
        {"prompt": "a: ", "completion": "good", "label": True},
        {"prompt": "a: ", "completion": "bad", "label": "false"},
        {"prompt": "b: ", "chosen": "yes", "rejected": "no"},
        {"input": "c: ", "output": "c", "label": 1},
    ]
    made = read(tmp_path, rows, "judged").rows
    assert [float(row.extras["label"]) for row in made] == [1, 0, 1, 0, 1]
    assert [(shown(row), shown(row.other)) for row in made] == [
        ("<s>a: |good</s>", "<s>a: |c</s>"),
        ("<s>a: |bad</s>", "<s>a: |c</s>"),
        ("<s>b: |yes</s>", "<s>b: |bad</s>"),
        ("<s>b: |no</s>", "<s>b: |bad</s>"),
        ("<s>c: |c</s>", "<s>c: |no</s>"),
    ]
    with pytest.raises(DataError, match="all rows have the same prompt"):
        read(tmp_path, rows[:2], "judged")


def test_rows_of_every_kind_are_kept_and_read_again(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)
    taught = {"input_ids": [1, 2], "teacher_ids": [[3, 4], [5, 6]]}
    taught["teacher_logprobs"] = [[-1.0, -2.0], [-0.5, -3.0]]
    judged = [
        {"prompt": p, "completion": "x", "label": i == 0} for i, p in enumerate("ab")
    ]
    keep, made = tmp_path / "kept", []
    kinds: tuple[tuple[Rows, list], ...]
    kinds = ("pairs", [PAIR]), ("judged", judged), ("teacher", [taught])
    for kind, rows in kinds:
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        made, again = (
            read_dataset(
                *(path, tiny.tokenizer(), DataConfig(train_on_prompt=True)),
                keep=keep,
                kind=kind,
            ).rows
            for _ in range(2)
        )
        for a, b in zip(made, again, strict=True):
            assert a.other is None or same(a.other, b.other)
            assert same(a, b)
    assert len(list(keep.iterdir())) == 3
    assert made[0].extras["teacher_ids"].tolist() == [[3, 4], [5, 6]]


def same(a: Row, b: Row | None) -> bool:
    assert b is not None and a.extras.keys() == b.extras.keys()
    pairs = [(a.tokens, b.tokens), (a.weights, b.weights)]
    pairs += [(a.extras[name], b.extras[name]) for name in a.extras]
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def test_turns_of_other_roles_train(tmp_path: Path):
    turns = [{"role": "system", "content": "sys"}, USER, said("yes"), USER, said("no")]
    for roles, wanted in (
        (("assistant",),
         "<s><system>sys<user>hi<assistant>[yes</s>]<user>hi<assistant>[no</s>]"),
        (("assistant", "user"),
         "<s><system>sys<user>[hi]<assistant>[yes</s>]<user>[hi]<assistant>[no</s>]"),
        (("system",), "<s><system>[sys]"),
    ):  # fmt: skip
        row, _ = read(tmp_path, 2 * [{"messages": turns}], "texts", train_on=roles).rows
        ends = np.flatnonzero(np.diff(row.weights)) + 1
        parts = [
            tiny.tokenizer().text_of(x.tolist()) for x in np.split(row.tokens, ends)
        ]
        first = row.weights[0] > 0
        text = "".join(
            f"[{part}]" if (i % 2 == 0) == first else part
            for i, part in enumerate(parts)
        )
        assert text == wanted
    refused: tuple[tuple[tuple[str, ...], str], ...]
    refused = (
        (("user", "bot"), "is user bot, expected some"),
        ((), "is nothing, expected"),
    )
    for roles, message in refused:
        with pytest.raises(ConfigError, match=message):
            DataConfig(train_on=roles)
    with pytest.raises(DataError, match="no tool turn to learn from"):
        read(tmp_path, 2 * [{"messages": turns}], "texts", train_on=("tool",))
