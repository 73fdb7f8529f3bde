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
from qlora_jax.evaluate import exact_match, perplexity, row_loss
from qlora_jax.generate import SampleConfig, generate

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
