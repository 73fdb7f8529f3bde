"""Texts that end an answer: found however they are spelled, and decoding ends there."""

import pytest
import tiny

from qlora_jax.inference import SampleConfig, Stop, generate, sample

PROMPTS = [[5, 9, 200], [77], [17, 18, 19, 20, 21, 22, 23, 24, 25]]
NEW = 3 * sample.STRIDE


def spelled(ids) -> str:
    """A decoder of two letters a token, so that a text can begin within one."""
    return "".join(f"{token % 7}{token % 3}" for token in ids)


@pytest.fixture(scope="module")
def model():
    return tiny.decoder()


@pytest.fixture(scope="module")
def whole(model) -> list[list[int]]:
    return generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW))


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Collects the number of tokens that each call of the loop was asked to reach."""
    asked, real = [], sample._continue

    def spy(*args):
        asked.append(args[-2])
        return real(*args)

    monkeypatch.setattr(sample, "_continue", spy)
    return asked


def test_a_row_holds_the_fewest_tokens_that_have_the_text(model, whole, steps):
    # Of each row a text that begins within a token, and ends within another.
    texts = tuple(
        spelled(row[n : n + 3])[1:-1] for row, n in zip(whole, (2, 5, 9), strict=True)
    )
    stop = Stop((), texts, spelled)
    got = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW), stop=stop)
    for row, full in zip(got, whole, strict=True):
        least = next(n for n in range(NEW) if stop.reached(full[:n]))
        assert row == full[:least]
    assert steps == [sample.STRIDE]  # and no token after the first look was made


def test_decoding_goes_on_until_every_row_has_its_text(model, whole, steps):
    at = sample.STRIDE + 4
    late = [spelled(row[at : at + 4]) for row in whole]
    stop = Stop((), (late[1],), spelled)
    least = [
        next((n for n in range(NEW) if stop.reached(row[:n])), NEW) for row in whole
    ]
    got = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW), stop=stop)
    assert got == [row[:n] for row, n in zip(whole, least, strict=True)]
    assert least[1] > sample.STRIDE  # or there was nothing to go on for
    looks = [16, 32, 48]
    assert steps == looks[: 1 + sum(max(least) > at for at in looks[:2])]


def test_texts_and_eos_end_rows_side_by_side(model, whole):
    eos = whole[0][3]
    stop = Stop((eos,), (spelled(whole[1][4:6]),), spelled)
    got = generate(model, PROMPTS, SampleConfig(max_new_tokens=NEW), stop=stop)
    for row, full in zip(got, whole, strict=True):
        ends = [n for n in range(NEW) if full[n] == eos]
        ends += [n for n in range(NEW) if stop.reached(full[:n])][:1]
        assert row == full[: min(ends, default=NEW)]


def test_a_special_tokens_text_counts_as_its_id():
    stop = Stop.of(tiny.tokenizer(), ("<user>", "\nQ:"), chat=False)
    assert stop.ids == (tiny.EOS, tiny.USER) and stop.texts == ("\nQ:",)


def test_a_text_is_cut_at_the_first_of_them():
    stop = Stop.of(tiny.tokenizer(), ("\nQ:", "c"), chat=False)
    assert stop.cut("ab\nQ: c\n") == "ab" == stop.cut("ab")
    assert Stop().cut("ab") == "ab"
