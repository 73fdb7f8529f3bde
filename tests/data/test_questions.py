"""Questions with choices: what rows mean, how they are asked, what goes before them."""

import json

import pytest
import tiny

from qlora_jax.data import DataConfig
from qlora_jax.data.questions import Question, read_questions, shots_of
from qlora_jax.errors import ConfigError, DataError

ROW = {
    "question": "Two and two?",
    "subject": "high_school_sums",
    "choices": ["three", "four", "five"],
    "answer": 1,
}
ABOUT = "The following are multiple choice questions (with answers)"


def of(row: dict) -> Question:
    return Question.of(row, DataConfig())


def test_letters_are_asked_as_mmlu_asks():
    one = of(ROW)
    body = "Two and two?\nA. three\nB. four\nC. five\nAnswer:"
    header = f"{ABOUT} about high school sums.\n\n"
    assert one.asked("letters") == header + body
    assert one.continuations("letters") == ("A", "B", "C")
    # The header stands once, and examples have their answers.
    other = one._replace(question="Q?", answer=2)
    shot = body.replace("Two and two?", "Q?") + " C\n\n"
    assert one.asked("letters", [other]) == header + shot + body
    assert of(ROW | {"subject": None}).asked("letters") == f"{ABOUT}.\n\n{body}"


def test_texts_are_asked_as_arc_asks():
    one = of(ROW)
    body = "Question: Two and two?\nAnswer:"
    assert one.asked("texts", [one]) == f"{body} four\n\n{body}"
    assert one.continuations("texts") == ("three", "four", "five")


@pytest.mark.parametrize(
    ("answer", "index"), [(0, 0), ("B", 1), (" C ", 2), ("five", 2)]
)
def test_an_answer_is_an_index_a_letter_or_a_text(answer, index):
    assert of(ROW | {"answer": answer}).answer == index


def test_lettered_inputs_come_out_as_they_were():
    text = (
        f"{ABOUT} about  biology.\n\nWhich?\nI. this\nA. of the first\nA. I only\n"
        "B. II,\nand more\nC. both\nAnswer:"
    )
    one = of({"input": text + " ", "output": "B", "subject": "biology"})
    assert one.asked("letters") == text
    assert one.choices == ("I only", "II,\nand more", "both") and one.answer == 1
    assert one.question == "Which?\nI. this\nA. of the first"
    assert one.asked("texts") == f"Question: {one.question}\nAnswer:"


def test_every_question_of_mmlu_comes_out_as_it_was(shared):
    path = shared / "data/mmlu/zero_shot_mmlu_val.json"
    questions = read_questions(path, DataConfig())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [q.asked("letters") for q in questions] == [row["input"] for row in rows]
    assert {len(q.choices) for q in questions} == {4}
    answers = [q.continuations("letters")[q.answer] for q in questions]
    assert answers == [row["output"] for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has 'text'; expected 'question', 'choices' and 'answer', or"),
        ({"choices": ["a", "b"]}, "has 'choices' but no 'question' and no 'answer'"),
        (ROW | {"choices": ["a"]}, "expected a list of 2 to 26 texts"),
        (ROW | {"choices": "ab"}, "expected a list of 2 to 26 texts"),
        (ROW | {"choices": ["a", " "]}, "expected a list of 2 to 26 texts"),
        (ROW | {"answer": 3}, "'answer' is 3, which is none of them; expected an index"),
        (ROW | {"answer": True}, "which is none of them"),
        (ROW | {"answer": "D"}, "'answer' is 'D', which is none of them"),
        (ROW | {"choices": ["B", "A"], "answer": "A"}, "could be several of them"),
        (ROW | {"choices": ["x", "x"], "answer": "x"}, "could be several of them"),
        ({"input": "Q?\nA. x\nAnswer:", "output": "A"}, "has no lettered choices"),
        ({"input": "Q?\nA. x\nB. y\nAnswer:", "output": "C"},
         "'output' is 'C', expected a letter from A to B"),
    ],
)  # fmt: skip
def test_rows_that_are_no_questions_are_refused(row, message):
    with pytest.raises(DataError) as caught:
        of(row)
    assert message in str(caught.value)


def test_lines_that_cannot_be_used_are_all_named(tmp_path):
    rows = [ROW, ROW | {"answer": 9}, {"text": "a"}]
    path = tiny.write_jsonl(tmp_path / "q.json", rows)
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*:2: 'answer'.*:3: has 'text'"
    ):
        read_questions(path, DataConfig())


def made(count: int, subject: str | None) -> list[Question]:
    row = ROW | {"subject": subject}
    return [of(row | {"question": f"{subject} {i}"}) for i in range(count)]


def test_shots_are_the_first_others_of_the_subject():
    some = [*made(3, "a"), *made(3, "b")]
    asked = [[q.question for q in shots] for shots in shots_of(some, 2)]
    assert asked == [
        ["a 1", "a 2"], ["a 0", "a 2"], ["a 0", "a 1"],
        ["b 1", "b 2"], ["b 0", "b 2"], ["b 0", "b 1"],
    ]  # fmt: skip
    assert shots_of(some, 0) == [[]] * 6


def test_shots_of_a_file_are_never_the_question_itself():
    some = made(2, "a")
    pool = [some[0], some[0]._replace(answer=0), *made(4, "a")[1:]]
    asked = [[q.question for q in shots] for shots in shots_of(some, 2, pool)]
    assert asked == [["a 1", "a 2"], ["a 0", "a 0"]]
    # Examples without a subject serve every question.
    (shots,) = shots_of(some[:1], 2, made(2, None))
    assert [q.question for q in shots] == ["None 0", "None 1"]


def test_too_few_shots_are_named_by_subject():
    with pytest.raises(DataError, match=r"(?s)--shots 2: too few.*1 problem.*b: 1"):
        shots_of([*made(3, "a"), *made(2, "b")], 2)
    with pytest.raises(ConfigError, match="--shots is -1, expected 0 or more"):
        shots_of(made(2, "a"), -1)
