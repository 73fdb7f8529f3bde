"""Row forms: one object to texts, and what of them trains.

A row's form is found by its keys; the first of this list that it has counts.

| form | keys | what the model sees; what trains is after the bar |
|---|---|---|
| ids | input_ids, labels or a mask | the ids as they are; those whose label is not -100 |
| prompt template | --data.prompt-template, output | BOS, its prompt, bar, output, EOS |
| messages | messages | the chat template; the assistant's turns |
| sharegpt | conversations (from and value, or role and content) | the same |
| completion | prompt, completion (texts) | prompt, bar, completion, EOS |
| completion | prompt, completion (messages) | the chat template; the completion's turns |
| alpaca | instruction, input, system; output | BOS, Alpaca's prompt, bar, output, EOS |
| pair | input, output | BOS, input, bar, output, EOS   (qlora.py) |
| text | text | as the tokenizer has a text, EOS; all of it trains |

An objective may take other rows: pairs (`chosen`, `rejected`; data/pairs.py), judged answers
(any of these, with a `label`, true or false; or pairs, of which each answer is a row), or what
a teacher says of ids (`input_ids`, `teacher_ids`, `teacher_logprobs`; data/given_ids.py). A row
of another kind is refused, and the message says how to train on it.

`context` and `response` stand for Alpaca's `input` and `output`, `conversation` for
`conversations`. Rows of turns may have `system`, `tools`, `documents`,
`chat_template_kwargs`, and whatever else the chat template takes. With `--data.chat`,
completion, alpaca and pair rows become a user's turn and the assistant's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qlora_jax.config.data import DataConfig
from qlora_jax.config.objective import Rows
from qlora_jax.data.conversations import conversation_of
from qlora_jax.data.fields import first_of, keys_of, listed, renamed, text_of
from qlora_jax.data.given_ids import Ids, Taught, ids_of, taught_of
from qlora_jax.data.near_miss import of_another_kind, unknown
from qlora_jax.data.pairs import is_pair, judgement, sides_of
from qlora_jax.data.prompt_template import PromptTemplate
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer
from qlora_jax.text.chat import check_text, checked_messages, variables_of
from qlora_jax.text.turns import Span, examples_of

Kind = Literal["pair", "text", "chat"]


class Example(NamedTuple):
    """A text, what of it trains, and how it begins and ends.

    Attributes:
      text: All of it.
      spans: What trains, in order.
      kind: A pair gets BOS and EOS around it, a text what its tokenizer puts before one,
        and EOS; a chat has its own.
    """

    text: str
    spans: tuple[Span, ...]
    kind: Kind


class Pair(NamedTuple):
    """The examples of a chosen and of a rejected answer."""

    chosen: Example
    rejected: Example


class Judged(NamedTuple):
    """An example, and whether its answer is good: 1, or 0."""

    example: Example | Ids
    label: float


Made = Example | Ids | Pair | Judged | Taught


class Formed(NamedTuple):
    """What a row became.

    Attributes:
      form: Its name in the table above.
      examples: One, or one for each assistant turn.
      unused: Fields that nothing reads.
      unread: Fields that were given to the chat template, which has no name for them.
    """

    form: str
    examples: Sequence[Made]
    unused: frozenset[str]
    unread: frozenset[str] = frozenset()


# The prompts of Stanford Alpaca, which models tuned on its format expect verbatim.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that "
    "appropriately completes the request."
)
_ALPACA_MORE = ", paired with an input that provides further context"


class Former:
    """Turns rows into examples, as settings and a tokenizer say.

    Raises:
      ConfigError: the prompt template is no Jinja, or reads no field.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, rows: Rows = "texts"):
        self.config, self.tokenizer = config, tokenizer
        self.rows: Rows = rows
        self._prompt = None
        if config.prompt_template is not None:
            self._prompt = PromptTemplate(config.prompt_template)

    def __call__(self, row: Mapping[str, Any]) -> Formed:
        """Returns what a row becomes.

        Raises:
          DataError: it has none of the known forms, or a value that does not fit.
        """
        given = {key for key, value in row.items() if value not in (None, "", [])}
        row = renamed(row, self.config)
        form, made, used, unread = self._of_kind(row)
        for one in made:
            for example in one if isinstance(one, Pair | Judged) else (one,):
                if isinstance(example, Example):
                    check_text("the text that the row makes", example.text)
        used = {self.config.renamed.get(key, key) for key in used}
        return Formed(form, made, frozenset(given - used), frozenset(unread))

    def _of_kind(
        self, row: dict[str, Any]
    ) -> tuple[str, Sequence[Made], set[str], set[str]]:
        """Returns what `_formed` does, of a row of the kind that the objective takes."""
        if (problem := of_another_kind(row, self.rows)) is not None:
            raise DataError(problem)
        if self.rows == "texts":
            return self._formed(row)
        if self.rows == "teacher":
            made, used = taught_of(row)
            return "ids with a teacher's", [made], used, set()
        if is_pair(row):
            form, pair, used, unread = self._pair(row)
            if self.rows == "pairs":
                return f"{form}, chosen and rejected", [pair], used, unread
            judged = [Judged(pair.chosen, 1.0), Judged(pair.rejected, 0.0)]
            return f"{form}, chosen and rejected", judged, used, unread
        label = judgement(row)
        rest = {key: value for key, value in row.items() if key != "label"}
        form, examples, used, unread = self._formed(rest)
        return (
            f"{form}, judged",
            [Judged(self._only(examples), label)],
            used | {"label"},
            unread,
        )

    def _pair(self, row: dict[str, Any]) -> tuple[str, Pair, set[str], set[str]]:
        """Returns (form, the pair, the keys that it read, keys the template has none for)."""
        sides = sides_of(row, template=self._prompt is not None)
        made = [self._formed(side) for side in sides.rows]
        chosen, rejected = (self._only(examples) for _, examples, *_ in made)
        assert isinstance(chosen, Example) and isinstance(rejected, Example)
        used = set().union(*(used for _, _, used, _ in made)) - sides.made
        unread = set().union(*(unread for *_, unread in made))
        return made[0][0], Pair(chosen, rejected), used | sides.read, unread

    def _only(self, examples: Sequence[Example | Ids]) -> Example | Ids:
        if len(examples) != 1:
            raise DataError(
                "has several assistant turns in an answer, which the chat template renders "
                "otherwise than the last; give earlier turns with the prompt"
            )
        return examples[0]

    def _formed(
        self, row: dict[str, Any]
    ) -> "tuple[str, list[Example] | list[Ids], set[str], set[str]]":
        """Returns (form, examples, the keys that it read, keys the template has none for)."""
        if "input_ids" in row:
            made, used = ids_of(row)
            return "ids", made, used, set()
        if self._prompt is not None:
            if "output" not in row:
                raise DataError(
                    f"has {keys_of(row)}; --data.prompt-template makes the prompt, the answer "
                    "is 'output' (--data.columns output=...)"
                )
            prompt = self._prompt.render(row)
            made, used, unread = self._asked(prompt, row, "output", self._prompt.fields)
            return "prompt template", made, used, unread
        for key in ("messages", "conversations", "conversation"):
            if key in row:
                form = "messages" if key == "messages" else "sharegpt"
                messages, read = conversation_of(row, key)
                made, used, unread = self._chat(messages, row)
                return form, made, used | read, unread
        if "prompt" in row and "completion" in row:
            return "completion", *self._completion(row)
        answer = first_of(row, ("output", "response"))
        if "instruction" in row and answer is not None:
            return "alpaca", *self._alpaca(row, answer)
        if "input" in row and "output" in row:
            return "pair", *self._asked(text_of(row, "input"), row, "output", {"input"})
        if "text" in row:
            if self.config.chat:
                raise DataError(
                    "has 'text', which has no turns; --data.chat is for pairs"
                )
            text = text_of(row, "text")
            example = Example(text, (Span(0, len(text)),), "text")
            return "text", [example], {"text"}, set()
        raise DataError(unknown(row))

    def _asked(
        self,
        prompt: str,
        row: dict[str, Any],
        answer: str,
        used: set[str],
        *,
        kind: Kind = "pair",
        system: str = "",
    ) -> tuple[list[Example], set[str], set[str]]:
        """Returns a prompt and its answer, as one text or as turns."""
        said = text_of(row, answer)
        if self.config.chat:
            turns = [("system", system)] if system else []
            turns += [("user", prompt), ("assistant", said)]
            messages = [{"role": role, "content": text} for role, text in turns]
            made, more, unread = self._chat(messages, row)
            return made, used | more | {answer}, unread
        whole = prompt + said
        example = Example(whole, (Span(len(prompt), len(whole)),), kind)
        return [example], used | {answer}, set()

    def _alpaca(
        self, row: dict[str, Any], answer: str
    ) -> tuple[list[Example], set[str], set[str]]:
        asked = text_of(row, "instruction")
        more_key = first_of(row, ("input", "context"))
        more = text_of(row, more_key) if more_key and row[more_key] else ""
        system = text_of(row, "system") if row.get("system") else ""
        used = {"instruction", "system", more_key or "input"}
        if self.config.chat:
            prompt = f"{asked}\n\n{more}" if more else asked
            return self._asked(prompt, row, answer, used, system=system)
        opening = system or _ALPACA.format(more=_ALPACA_MORE if more else "")
        prompt = f"{opening}\n\n### Instruction:\n{asked}\n\n"
        prompt += f"### Input:\n{more}\n\n" if more else ""
        return self._asked(prompt + "### Response:\n", row, answer, used)

    def _completion(
        self, row: dict[str, Any]
    ) -> tuple[list[Example], set[str], set[str]]:
        used = {"prompt", "completion"}
        turns = [listed(row["prompt"]), listed(row["completion"])]
        if all(isinstance(one, list) for one in turns):
            before = checked_messages(turns[0], "prompt")
            after = checked_messages(turns[1], "completion")
            roles = self.config.train_on
            if all(message["role"] not in roles for message in after):
                raise DataError(
                    f"has a completion without a turn of {' or '.join(roles)}"
                )
            before = [{**message, "weight": 0} for message in before]
            made, more, unread = self._chat([*before, *after], row)
            return made, used | more, unread
        if any(isinstance(one, list) for one in turns):
            raise DataError("has 'prompt' and 'completion' of which one is messages")
        system = text_of(row, "system") if row.get("system") else ""
        if system and self.config.chat:
            used.add("system")
        prompt = text_of(row, "prompt")
        return self._asked(prompt, row, "completion", used, kind="text", system=system)

    def _chat(
        self, messages: list[dict[str, Any]], row: dict[str, Any]
    ) -> tuple[list[Example], set[str], set[str]]:
        template = self.tokenizer.template(tools=row.get("tools") is not None)
        variables = variables_of(row, template)
        made = examples_of(messages, template, variables, self.config.train_on)
        unread = template.unread(messages)
        unread |= {
            key
            for key in ("tools", "documents")
            if variables.get(key) and key not in template.variables
        }
        used = {"chat_template_kwargs", "tools", "documents", *template.variables}
        return [Example(text, spans, "chat") for text, spans in made], used, unread
