"""Perplexity, row loss and exact match against direct computations."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluate import (
    answer_figures,
    exact_match,
    extractor,
    perplexity,
    row_loss,
    row_losses,
    window_losses,
)
from qlora_jax.evaluate.exact_match import Answer
from qlora_jax.inference import SampleConfig, generate

RELATIVE = 1e-5
"""float32 sums in another order."""


def log_p(model, ids: list[int]) -> np.ndarray:
    """Returns log p of each token but the first, from plain logits."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    log = jax.nn.log_softmax(jnp.asarray(tiny.logits(model, padded)), axis=-1)[0]
    return np.array([log[i, token] for i, token in enumerate(ids[1:])], np.float64)


def test_perplexity_is_exp_of_the_mean_over_windows():
    model, ids = tiny.quantized(), list(range(20, 42))
    windows = [[tiny.BOS, *ids[i : i + 10]] for i in range(0, 22, 10)]
    expected = np.concatenate([log_p(model, window) for window in windows])
    value, count = perplexity(model, ids, window=10, bos_id=tiny.BOS, batch_size=2)
    assert count == 22
    assert value == pytest.approx(math.exp(-expected.mean()), rel=RELATIVE)


def test_without_bos_the_first_token_of_a_window_is_only_read():
    model, ids = tiny.quantized(), list(range(20, 41))
    windows = [ids[:10], ids[10:20]]  # the last one, a single token, predicts nothing
    expected = np.concatenate([log_p(model, window) for window in windows])
    value, count = perplexity(model, ids, window=10, batch_size=2)
    assert count == 18
    assert value == pytest.approx(math.exp(-expected.mean()), rel=RELATIVE)


def test_a_text_with_nothing_to_predict_is_refused():
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(tiny.quantized(), [], window=4)


def test_row_loss_is_the_mean_over_trained_tokens():
    model, data = tiny.quantized(), tiny.rows([6, 9, 7])
    parts = [
        log_p(model, row.tokens.tolist())[row.weights[1:] > 0] for row in data.rows
    ]
    expected = -np.concatenate(parts)
    loss, count = row_loss(model, data, batch_size=2)
    assert count == expected.size
    assert loss == pytest.approx(expected.mean(), rel=RELATIVE)


def test_errors_are_those_of_a_ratio_over_rows():
    model, data = tiny.quantized(), tiny.rows([6, 9, 7])
    losses = row_losses(model, data, batch_size=2)
    parts = [
        -log_p(model, row.tokens.tolist())[row.weights[1:] > 0] for row in data.rows
    ]
    assert losses.sums == pytest.approx([part.sum() for part in parts], rel=RELATIVE)
    assert losses.counts.tolist() == [4, 6, 5]
    # Each row's distance from its share of the mean, over the mean tokens of a row.
    mean = losses.sums.sum() / 15
    away = losses.sums - mean * losses.counts
    error = np.sqrt((away**2).sum() / 2 / 3) / 5
    figures = losses.figures()
    assert figures["loss_stderr"] == pytest.approx(error)
    assert figures["perplexity_stderr"] == pytest.approx(math.exp(mean) * error)
    assert losses.of([1]).figures()["loss_stderr"] is None


def test_windows_of_one_length_have_the_error_of_their_mean():
    losses = window_losses(tiny.quantized(), list(range(20, 51)), window=11)
    assert losses.counts.tolist() == [10, 10, 8]
    means = (losses.sums / losses.counts)[:2]
    expected = means.std(ddof=1) / 2**0.5
    assert losses.of([0, 1]).loss.stderr == pytest.approx(expected)


def test_a_conversation_is_asked_its_last_turn_with_what_was_before(tmp_path: Path):
    model, tokenizer = tiny.quantized(), tiny.tokenizer()
    turns = ["a?", "first answer", "b?"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    prompt = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=True))
    config = SampleConfig(max_new_tokens=6)
    (new,) = generate(model, [prompt], config, eos_ids=tokenizer.stop_ids)
    said = {"role": "assistant", "content": tokenizer.decode(new)}
    rows = [{"messages": [*messages, said]}, {"messages": messages[:2]}]
    path = tiny.write_jsonl(tmp_path / "chat.jsonl", rows)
    data = read_dataset(path, tokenizer, DataConfig())
    share, answers = exact_match(model, data, tokenizer, max_new_tokens=len(new))
    assert answers[0].expected == answers[0].given == said["content"]
    assert answers[1].expected == "first answer" and share == 0.5


def test_answers_are_compared_as_the_pattern_takes_them_out(tmp_path: Path):
    model, tokenizer = tiny.quantized(), tiny.tokenizer()
    rows = [
        {"input": "abc", "output": "so #### 7"},
        {"input": "xy", "output": "#### 1,0"},
    ]
    data = read_dataset(
        tiny.write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, DataConfig()
    )
    settings = {"max_new_tokens": 4, "extract": extractor("gsm8k")}
    _, (first, second) = exact_match(model, data, tokenizer, **settings)
    assert first.extracted == ("7", None) and not first.correct
    assert second.line()["expected_answer"] == "1,0"
    rows[1]["output"] = "the answer is 10"
    data = read_dataset(
        tiny.write_jsonl(tmp_path / "b.jsonl", rows), tokenizer, DataConfig()
    )
    with pytest.raises(
        DataError, match=r"(?s)1 of 2 expected answers.*row 2 ends in 'the a"
    ):
        exact_match(model, data, tokenizer, **settings)


def test_figures_of_answers_say_how_many_had_no_match():
    text = "whatever was said"
    answers = [
        Answer("", text, text, ("1,000", "$1000.")),
        Answer("", text, text, ("7", None)),
        Answer("", text, text, ("7", "8")),
    ]
    assert answer_figures(answers) == {
        "exact_match": pytest.approx(1 / 3),
        "exact_match_stderr": pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5),
        "answers_without_match": 1,
    }
    plain = answer_figures([Answer("", "a", " a\n"), Answer("", "1", "1.0")])
    assert plain == {"exact_match": 0.5, "exact_match_stderr": pytest.approx(0.5)}


@pytest.mark.slow
def test_exact_match_compares_greedy_answers(tmp_path: Path):
    model, tokenizer = tiny.quantized(), tiny.tokenizer()
    prompts = ["abc", "xy", "hello"]
    config = SampleConfig(max_new_tokens=6)
    ids = [[tiny.BOS, *tokenizer.encode(p)] for p in prompts]
    answers = [
        tokenizer.decode(new)
        for new in generate(model, ids, config, eos_ids=tokenizer.eos_ids)
    ]
    answers[1] = "surely not this"
    path = tmp_path / "rows.jsonl"
    pairs = zip(prompts, answers, strict=True)
    path.write_text(
        "".join(json.dumps({"input": p, "output": a}) + "\n" for p, a in pairs)
    )
    rows = read_dataset(path, tokenizer, DataConfig())
    share, given = exact_match(model, rows, tokenizer, batch_size=2, max_new_tokens=6)
    assert share == pytest.approx(2 / 3)
    assert [a.correct for a in given] == [True, False, True]
    assert [a.expected for a in given] == answers


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 10, "batch_size": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]):
    (name,) = (name for name, value in wrong.items() if value == 0)
    with pytest.raises(ConfigError, match=f"{name.replace('_', '-')} is 0, expected"):
        perplexity(tiny.quantized(), list(range(20)), **wrong)
