"""Exact match: does the greedy answer equal the row's?"""

from typing import Any, NamedTuple

from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.data import Dataset
from qlora_jax.generate import SampleConfig, decoded, generate


class Answer(NamedTuple):
    """A prompt, the expected and the given answer, all as text."""

    prompt: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        """Whether they are equal, space around them aside."""
        return self.expected.strip() == self.given.strip()


def exact_match(
    model: Any,
    dataset: Dataset,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> tuple[float, list[Answer]]:
    """Answers every row's prompt greedily and compares.

    Args:
      model: A Decoder, with or without an adapter; or an AdapterBank, of which each row
        takes the adapter that it names.
      dataset: Rows; of a conversation the last answer that trains is asked for.
      tokenizer: From `load`.
      batch_size: Rows at once; they are sorted by length first.
      max_new_tokens: Where a wrong answer is cut off.

    Returns:
      The share of correct rows, and every answer in the dataset's order.
    """
    config = SampleConfig(max_new_tokens=max_new_tokens)
    model = decoded(model)
    rows = dataset.rows
    # What ends a turn of the chat template may be none of the model's EOS.
    chat = any(row.chat for row in rows)
    ends = tokenizer.stop_ids if chat else tokenizer.eos_ids
    order = sorted(range(len(rows)), key=lambda i: rows[i].prompt)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        # A short last batch is filled up, so that it compiles nothing anew.
        full = picked + picked[:1] * (min(batch_size, len(order)) - len(picked))
        prompts = [rows[i].tokens[: rows[i].prompt].tolist() for i in full]
        routed = model
        if isinstance(model, AdapterBank):
            routed = model.route([rows[i].adapter for i in full])
        given = generate(routed, prompts, config, eos_ids=ends)
        for i, prompt, ids in zip(picked, prompts, given, strict=False):
            answers[i] = Answer(
                tokenizer.decode(prompt), rows[i].answer, tokenizer.decode(ids)
            )
    ordered = [answers[i] for i in range(len(rows))]
    return sum(answer.correct for answer in ordered) / len(ordered), ordered
