"""Answers taken out of texts, and which of them are the same."""

import pytest

from qlora_jax.errors import ConfigError
from qlora_jax.evaluate.answers import extractor, same_answer


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("gsm8k", "2 + 2 = <<2+2=4>>4\n#### 4", "4"),
        ("gsm8k", "#### $1,000 \nQuestion: and now?\n#### 5", "$1,000"),
        ("gsm8k", "####72", "72"),
        ("gsm8k", "The answer is 42.", None),
        ("gsm8k", "#### \nnothing", None),
        ("boxed", r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed {x \} y}", r"x \} y"),
        ("boxed", r"\boxed{7} then \boxed{cut o", "7"),
        ("boxed", "no box", None),
        (r"answer is (\d+)", "answer is 4; no, the answer is 5.", "5"),
        (r"\d+", "4 and 5", "5"),
        (r"(\d+)|none", "none", None),
    ],
)
def test_an_answer_is_taken_out_of_a_text(pattern, text, answer):
    assert extractor(pattern)(text) == answer


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("1000", "1,000"),
        ("18", "18.0"),
        ("18", "$18"),
        ("18", "18."),
        ("1,234,567.50", "$1234567.5."),
        ("-3", "-$3"),
        ("-3", "$-3"),
        ("-3", "\u22123"),
        ("0.5", ".5"),
        ("7", "+7"),
        (" Paris", "Paris "),
        ("1/2", "1/2"),
        ("18", r"\$18"),
    ],
)
def test_answers_that_are_the_same(expected, given):
    assert same_answer(expected, given) and same_answer(given, expected)


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("18", "19"),
        ("3", "-3"),
        ("0.5", "1/2"),
        ("18", "18%"),
        ("18", "18 apples"),
        ("1,2", "12"),
        ("10000", "1,00,00"),
        ("--3", "3"),
        ("a", "A"),
    ],
)
def test_answers_that_are_not(expected, given):
    assert not same_answer(expected, given) and not same_answer(given, expected)


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(
        ConfigError, match=r"'\(' is no regular expression.*or gsm8k or"
    ):
        extractor("(")
