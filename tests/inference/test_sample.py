"""generate against the full forward pass: greedy, batched, stopped, sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.inference import SampleConfig, generate
from qlora_jax.inference.sample import _choose

NEW = 6
PROMPTS = [[5, 9, 200], [77], [17, 18, 19, 20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def model():
    return tiny.adapted(tiny.quantized())


def next_logits(model, row: list[int]) -> np.ndarray:
    """Returns the logits after a row, by the full forward pass of one padded length."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(row)] = row
    return tiny.logits(model, jnp.asarray(tokens))[0, len(row) - 1]


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    """The likeliest continuations, each token from a forward pass of its own."""
    rows = []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(NEW):
            row.append(int(next_logits(model, row).argmax()))
        rows.append(row[len(prompt) :])
    return rows


def test_greedy_takes_the_argmax_of_the_full_forward_pass(model, greedy):
    assert generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW)) == greedy
    assert (
        len({token for row in greedy for token in row}) > 3
    )  # the model says something


def test_a_batch_of_different_lengths_equals_one_by_one(model, greedy):
    config = SampleConfig(max_new_tokens=NEW)
    assert [generate(model, [prompt], config)[0] for prompt in PROMPTS] == greedy


def test_a_row_stops_at_its_eos_and_others_go_on(model, greedy):
    ends = (greedy[0][2], greedy[1][0])
    new = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW), eos_ids=ends)
    for row, whole in zip(new, greedy, strict=True):
        stop = next((i for i, token in enumerate(whole) if token in ends), NEW)
        assert row == whole[:stop]
    assert len(new[0]) <= 2 and new[1] == []
    assert len(new[2]) > 2


def test_top_k_of_one_is_greedy(model, greedy):
    config = SampleConfig(max_new_tokens=NEW, temperature=1.0, top_k=1, seed=4)
    assert generate(model, PROMPTS, config) == greedy


def test_sampling_follows_its_seed(model):
    def sample(seed: int) -> list[list[int]]:
        config = SampleConfig(max_new_tokens=NEW, temperature=2.0, seed=seed)
        return generate(model, [PROMPTS[0]] * 3, config)

    one, again, other = (sample(seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != one[1]  # rows of a batch differ


def chosen(**config) -> np.ndarray:
    """Returns the shares of 4 tokens among 4000 draws."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))
    config = SampleConfig(**({"temperature": 1.0} | config))
    picked = _choose(logits, config, jax.random.key(0))
    return np.bincount(np.asarray(picked), minlength=4) / len(picked)


THREE_SIGMA = 0.03
"""The deviation allowed: three standard errors of a share of 0.5 among 4000 draws are 0.024."""


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 1.0, "top_k": 10}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(config, shares):
    drawn = chosen(**config)
    np.testing.assert_allclose(drawn, shares, atol=THREE_SIGMA)
    assert not drawn[np.array(shares) == 0].any()


def test_no_prompts_give_nothing(model):
    assert generate(model, []) == []


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(
        ShapeError, match=r"prompts \[1\] have no tokens; give at least"
    ):
        generate(model, [[1], []])


@pytest.mark.parametrize("token", [272, -1])
def test_ids_outside_the_vocabulary_are_refused(model, token):
    with pytest.raises(ShapeError, match=f"{token}.*vocabulary has 272"):
        generate(model, [[1, token]], SampleConfig(max_new_tokens=NEW))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0, expected 1 or more"),
        ({"temperature": -1.0}, "--temperature is -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_k": 0}, "--top-k is 0, expected 1 or more"),
        ({"top_p": 0.0}, "--top-p is 0.0, expected 0 < p <= 1"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
    ],
)
def test_a_wrong_sample_config_names_the_flag(config, message):
    with pytest.raises(ConfigError, match=message):
        SampleConfig(**config)


def test_all_problems_of_a_sample_config_come_at_once():
    with pytest.raises(ConfigError, match=r"max-new-tokens.*temperature.*top-k.*top-p"):
        SampleConfig(max_new_tokens=0, temperature=-1.0, top_k=0, top_p=2.0)
