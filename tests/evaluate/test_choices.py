"""Likelihoods of choices against plain logits, and what is made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.adapters.value import Adapter
from qlora_jax.data import DataConfig
from qlora_jax.data.questions import Question
from qlora_jax.errors import DataError
from qlora_jax.evaluate import ask, choice_figures, choices, score_choices
from qlora_jax.evaluate.choices import Scored
from qlora_jax.text.tokenizer import Tokenizer

CLOSE = 2e-4
"""Nats; float32 sums of up to a dozen terms in another order."""

QUESTIONS = [
    Question("Sum?", ("four", "five and", "six"), 1, subject="sums"),
    Question("What is it that follows?", ("x", "yes"), 0, subject="rest"),
    Question("Sky?", ("blue", "green"), 0, subject="rest"),
]


@functools.cache
def lettered(*, merged: tuple[str, ...] = ("A", "B", "C")) -> Tokenizer:
    """Returns a tokenizer of bytes to which " A", " B" and " C" are one token each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    vocab |= {f"Ġ{letter}": 256 + i for i, letter in enumerate(merged)}
    merges = [("Ġ", letter) for letter in merged]
    made = Raw(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return Tokenizer(made, before=(260,))


def log_p(model, tokenizer: Tokenizer, prompt: str, choice: str) -> float:
    """Returns log p of a choice after a prompt, from the logits of every position."""
    ids = tokenizer.begun(tokenizer.encode(f"{prompt} {choice}"))
    count = len(ids) - len(tokenizer.begun(tokenizer.encode(prompt)))
    padded = np.zeros((1, 192), np.int32)
    padded[0, : len(ids)] = ids
    log = jax.nn.log_softmax(jnp.asarray(tiny.logits(model, padded)), axis=-1)[0]
    places = range(len(ids) - count, len(ids))
    return sum(float(log[at - 1, ids[at]]) for at in places)


def check(model, tokenizer: Tokenizer, scored: list[Scored]) -> None:
    for one in scored:
        want = [log_p(model, tokenizer, one.prompt, choice) for choice in one.choices]
        assert one.log_likelihoods == pytest.approx(want, abs=CLOSE)


def test_texts_have_the_likelihood_of_their_tokens():
    model, tokenizer = tiny.decoder(), lettered()
    asked = ask(QUESTIONS, tokenizer, DataConfig(), form="texts")
    assert len(asked.items) == 7  # a row each
    before = choices._log_p._cache_size()
    scored = score_choices(model, asked, batch_size=3)
    assert choices._log_p._cache_size() - before <= 2  # lengths alone compile anew
    assert [one.question for one in scored] == QUESTIONS
    check(model, tokenizer, scored)


def test_letters_of_one_token_take_one_row_a_question():
    model, tokenizer = tiny.decoder(), lettered()
    pool = [question._replace(subject=None) for question in QUESTIONS]
    asked = ask(QUESTIONS, tokenizer, DataConfig(), shots=1, pool=pool)
    assert [len(item.choices) for item in asked.items] == [3, 2, 2]
    check(model, tokenizer, score_choices(model, asked, batch_size=2))


def test_letters_of_different_lengths_are_scored_apart():
    # " C" is two tokens here: then no row can hold all choices of its question.
    model, tokenizer = tiny.decoder(), lettered(merged=("A", "B"))
    asked = ask(QUESTIONS, tokenizer, DataConfig())
    assert [len(item.choices) for item in asked.items] == [1, 1, 1, 2, 2]
    check(model, tokenizer, score_choices(model, asked, batch_size=2))


@pytest.mark.slow
def test_each_question_takes_its_adapter():
    tokenizer = lettered()
    model = tiny.adapted(tiny.decoder())
    bank = AdapterBank.of(tiny.decoder(), {"a": Adapter.of(model)})
    named = [QUESTIONS[0]._replace(adapter="a"), QUESTIONS[1]]
    asked = ask(named, tokenizer, DataConfig())
    first, second = score_choices(bank, asked, batch_size=2)
    check(model, tokenizer, [first])
    check(tiny.decoder(), tokenizer, [second])


def test_long_questions_are_refused_left_out_or_cut_in_front():
    tokenizer = lettered()
    prompt = QUESTIONS[1].asked("letters")
    limit = len(tokenizer.encode(prompt))  # and BOS: one too many
    with pytest.raises(
        DataError, match=r"1 of 3 questions.*max-tokens.*--shots"
    ) as caught:
        ask(QUESTIONS, tokenizer, DataConfig(max_tokens=limit))
    with pytest.raises(DataError, match="1 of 3 questions are longer"):
        ask(QUESTIONS, tokenizer, DataConfig(max_tokens=limit, too_long="split"))
    assert f"question 2: {limit + 1} tokens" in str(caught.value)
    drop = DataConfig(max_tokens=limit, too_long="drop")
    asked = ask(QUESTIONS, tokenizer, drop)
    assert asked.dropped == 1 and asked.questions == [QUESTIONS[0], QUESTIONS[2]]
    assert {item.question for item in asked.items} == {0, 1}
    cut = DataConfig(max_tokens=limit, too_long="truncate")
    (item,) = (i for i in ask(QUESTIONS, tokenizer, cut).items if i.question == 1)
    assert item.tokens == tokenizer.encode(prompt)
    with pytest.raises(DataError, match=r"\(2 problems\):\n  question 1: 31 tokens"):
        # What is cut is never a choice.
        ask(
            QUESTIONS,
            tokenizer,
            DataConfig(max_tokens=4, too_long="truncate"),
            form="texts",
        )


def scored(
    answer: int, values: tuple[float, ...], subject: str | None = None
) -> Scored:
    texts = ("no", "certainly")
    return Scored(Question("", texts, answer, subject), "", texts, values)


def test_accuracy_takes_the_likeliest_and_acc_norm_the_likeliest_by_byte():
    # 2 and 9 bytes: -4 / 9 is more than -3 / 2.
    some = [
        scored(1, (-3.0, -4.0), "a"),
        scored(0, (-3.0, -4.0), "a"),
        scored(0, (-1.0, -9.0), "b"),
        scored(1, (-2.0, -2.0), "b"),
    ]
    said = choice_figures(some)
    assert (said["accuracy"], said["acc_norm"]) == (0.5, 0.75)
    # sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness
    assert said["accuracy_stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    assert said["acc_norm_stderr"] == pytest.approx((0.1875 / 3) ** 0.5)
    assert said["ties"] == 1
    assert said["by_subject"]["b"] == {
        "questions": 2,
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(0.5),
        "acc_norm": 1.0,
        "acc_norm_stderr": 0.0,
    }
    alone = choice_figures([scored(0, (-1.0, -2.0))])
    assert alone["accuracy"] == 1.0 and alone["accuracy_stderr"] is None
    assert "by_subject" not in alone
