"""Sampling: the cache, padding, stopping, and the choice of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.generate import SampleConfig, generate
from qlora_jax.generate.sample import _choose

PROMPTS = [[1, 2, 3, 4, 5, 6], [9, 8], [40, 41, 42]]
NEW = 5
WIDE = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))


@pytest.fixture(scope="module")
def model():
    return tiny.adapted(tiny.quantized())


def greedy_by_full_forward(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(tiny.logits(model, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_with_cache_and_left_padding_equals_the_full_forward(model):
    new = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW))
    assert new == [greedy_by_full_forward(model, p, NEW) for p in PROMPTS]


def test_a_row_stops_at_its_first_eos_and_leaves_it_out(model):
    free = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW))
    eos = free[0][2]
    stopped = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW), eos_ids=(eos,))
    for row, all_of_it in zip(stopped, free, strict=True):
        end = all_of_it.index(eos) if eos in all_of_it else NEW
        assert row == all_of_it[:end]


def test_sampling_follows_its_seed(model):
    def sample(seed: int) -> list[list[int]]:
        config = SampleConfig(max_new_tokens=NEW, temperature=2.0, seed=seed)
        return generate(model, PROMPTS, config)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def chosen(**config) -> np.ndarray:
    picked = _choose(WIDE, SampleConfig(temperature=1.0, **config), jax.random.key(0))
    return np.bincount(np.asarray(picked), minlength=4) / len(picked)


def test_temperature_one_samples_the_models_own_distribution():
    # 4000 draws: three standard deviations of a share of 0.5 are 0.024.
    np.testing.assert_allclose(chosen(), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_top_k_and_top_p_leave_out_the_tail():
    np.testing.assert_allclose(chosen(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    assert chosen(top_k=1).tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(chosen(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    assert chosen(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert (chosen(top_p=1.0, top_k=10) > 0).all()


def test_no_prompts_give_nothing_and_an_empty_one_is_named(model):
    assert generate(model, []) == []
    with pytest.raises(ShapeError, match=r"prompts \[1\] have no tokens"):
        generate(model, [[1], []])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0)],
)
def test_a_bad_value_names_its_flag(flag: str, value):
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} is"):
        SampleConfig(**{flag: value})
