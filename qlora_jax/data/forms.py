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

Rows of preferences (`chosen`, `rejected`) and nothing of these are refused: they need another
objective. The message says how to train on what was chosen.

`context` and `response` stand for Alpaca's `input` and `output`, `conversation` for
`conversations`. Rows of turns may have `system`, `tools`, `documents`,
`chat_template_kwargs`, and whatever else the chat template takes. With `--data.chat`,
completion, alpaca and pair rows become a user's turn and the assistant's.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from qlora_jax.config.data import DataConfig
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.text import Tokenizer
from qlora_jax.text.chat import checked_messages, variables_of
from qlora_jax.text.environment import environment, names_in, render
from qlora_jax.text.folder import read_text
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


class Ids(NamedTuple):
    """A row that was tokenized elsewhere: its ids, and the weight of each."""

    ids: list[int]
    weights: list[float]


class Formed(NamedTuple):
    """What a row became.

    Attributes:
      form: Its name in the table above.
      examples: One, or one for each assistant turn.
      unused: Fields that nothing reads.
      unread: Fields that were given to the chat template, which has no name for them.
    """

    form: str
    examples: "list[Example] | list[Ids]"
    unused: frozenset[str]
    unread: frozenset[str] = frozenset()


# The prompts of Stanford Alpaca, which models tuned on its format expect verbatim.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that "
    "appropriately completes the request."
)
_ALPACA_MORE = ", paired with an input that provides further context"

_ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bing", "bard", "bot"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CALLS = ("function_call", "tool_call")
_ASKING = ("question", "query", "problem", "instruction", "prompt", "source", "inputs")
_ANSWERING = (
    "answer",
    "response",
    "solution",
    "completion",
    "target",
    "targets",
    "label",
    "canonical_solution",
)


class Former:
    """Turns rows into examples, as settings and a tokenizer say.

    Raises:
      ConfigError: the prompt template is no Jinja, or reads no field.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
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
        form, made, used, unread = self._formed(row)
        for example in made:
            if isinstance(example, Example):
                check_unicode(example.text)
        used = {self.config.renamed.get(key, key) for key in used}
        return Formed(form, made, frozenset(given - used), frozenset(unread))

    def _formed(
        self, row: dict[str, Any]
    ) -> "tuple[str, list[Example] | list[Ids], set[str], set[str]]":
        """Returns (form, examples, the keys that it read, keys the template has none for)."""
        if "input_ids" in row:
            made, used = _ids(row)
            return "ids", made, used, set()
        if self._prompt is not None:
            if "output" not in row:
                raise DataError(
                    f"has {_keys(row)}; --data.prompt-template makes the prompt, the answer "
                    "is 'output' (--data.columns output=...)"
                )
            prompt = self._prompt.render(row)
            made, used, unread = self._asked(prompt, row, "output", self._prompt.fields)
            return "prompt template", made, used, unread
        for key in ("messages", "conversations", "conversation"):
            if key in row:
                form = "messages" if key == "messages" else "sharegpt"
                messages, read = _conversation(row, key)
                made, used, unread = self._chat(messages, row)
                return form, made, used | read, unread
        if "prompt" in row and "completion" in row:
            return "completion", *self._completion(row)
        answer = _first(row, ("output", "response"))
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
        raise DataError(_unknown(row))

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
        more_key = _first(row, ("input", "context"))
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
        turns = [_listed(row["prompt"]), _listed(row["completion"])]
        if all(isinstance(one, list) for one in turns):
            before = checked_messages(turns[0], "prompt")
            after = checked_messages(turns[1], "completion")
            if all(message["role"] != "assistant" for message in after):
                raise DataError("has a completion without an assistant turn")
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
        made = examples_of(messages, template, variables)
        unread = template.unread(messages)
        unread |= {
            key
            for key in ("tools", "documents")
            if variables.get(key) and key not in template.variables
        }
        used = {"chat_template_kwargs", "tools", "documents", *template.variables}
        return [Example(text, spans, "chat") for text, spans in made], used, unread


class _Required(jinja2.Undefined):
    """A field that is not there: it may be asked for (`if x`), and not written."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


class PromptTemplate:
    """A prompt made of a row's fields, in Jinja's language.

    Attributes:
      fields: Those that it reads.
    """

    def __init__(self, choice: str):
        """Opens one: a file, or the template itself.

        Raises:
          ConfigError: it is no Jinja, or reads no field.
        """
        try:
            file = Path(choice).expanduser().is_file()
        except (OSError, ValueError, RuntimeError):  # no path at all
            file = False
        self.source = read_text(Path(choice).expanduser()) if file else choice
        try:
            self.fields = set(names_in(self.source)[0])
            # Line breaks after a block are the prompt's, as Jinja itself has it.
            strict = environment().overlay(
                undefined=_Required, trim_blocks=False, lstrip_blocks=False
            )
            self._template = strict.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"--data.prompt-template is no Jinja: {error}") from None
        if not self.fields:
            raise ConfigError(
                f"--data.prompt-template {choice!r} reads no field of a row; write one as "
                "{{ question }}"
            )

    def render(self, row: Mapping[str, Any]) -> str:
        """Returns the prompt of a row.

        Raises:
          DataError: the row lacks a field that is written, or the template refuses it.
        """
        given = {key: value for key, value in row.items() if value is not None}
        try:
            return render(self._template, given)[0]
        except jinja2.UndefinedError as error:
            raise DataError(
                f"has {_keys(row)}; --data.prompt-template: {error.message}"
            ) from None
        except Exception as error:  # a template can fail in any way that Python can
            raise DataError(
                f"--data.prompt-template refuses the row: {error}"
            ) from None


def renamed(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """Returns a row whose fields have the names that are known here (--data.columns).

    Raises:
      DataError: it lacks one of the fields.
    """
    names = config.renamed
    if absent := [f"{to}={key}" for to, key in names.items() if key not in row]:
        raise DataError(
            f"has {_keys(row)}, and not what --data.columns names: {', '.join(absent)}"
        )
    kept = {key: value for key, value in row.items() if key not in names.values()}
    return {**kept, **{to: row[key] for to, key in names.items()}}


def check_unicode(text: str) -> None:
    """Raises DataError for half a surrogate pair, as a field that a template writes may be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"makes a text that is no Unicode: {error}") from None


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Returns a row's string, which Unicode can encode.

    Raises:
      DataError: it is another type, or half of a surrogate pair.
    """
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{key!r} is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} is no Unicode text: {error}") from None
    return text


def chosen_adapter(row: Mapping[str, Any], adapters: tuple[str, ...]) -> str | None:
    """Returns the adapter that a row's "adapter" field names; None where it has none.

    Raises:
      DataError: it is none of these.
    """
    name = row.get("adapter")
    if name is not None and name not in adapters:
        known = ", ".join(adapters)
        raise DataError(f"'adapter' is {name!r}, expected one of {known}")
    return name


def _listed(value: Any) -> Any:
    """Returns what tables of text hold of a list: its JSON, read."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[]"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _conversation(
    row: Mapping[str, Any], key: str
) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns the messages of a row, as chat templates take them, and the keys read."""
    turns = _listed(row[key])
    if isinstance(turns, list):
        turns = [
            _message(turn) if isinstance(turn, dict) and "from" in turn else turn
            for turn in turns
        ]
    messages = checked_messages(turns, key)
    if row.get("system") and messages[0]["role"] != "system":
        system = {"role": "system", "content": text_of(row, "system")}
        return [system, *messages], {key, "system"}
    return messages, {key}


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ShareGPT's form of a turn as a message."""
    name, rest = turn["from"], {k: v for k, v in turn.items() if k != "from"}
    if not isinstance(name, str):
        raise DataError(f"'from' is {type(name).__name__}, expected a string")
    if "value" not in rest:
        raise DataError("has a turn with 'from' and without 'value'")
    said = rest.pop("value")
    if name in _CALLS:
        try:
            calls = json.loads(said) if isinstance(said, str) else said
        except ValueError:
            raise DataError(f"has a turn of {name!r} whose value is no JSON") from None
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"type": "function", "function": call} for call in calls]
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    if name not in _ROLE_OF:
        known = ", ".join((*_ROLE_OF, *_CALLS))
        raise DataError(f"has a turn from {name!r}, expected one of {known}")
    return {"role": _ROLE_OF[name], "content": said, **rest}


def _ids(row: Mapping[str, Any]) -> tuple[list[Ids], set[str]]:
    """Reads a row that was tokenized elsewhere: Hugging Face's labels, TRL's masks."""
    ids = _numbers(row, "input_ids")
    if not ids or any(one < 0 or one >= 2**31 for one in ids):
        raise DataError("'input_ids' is empty, or has numbers that are no ids")
    used = {"input_ids", "attention_mask"}
    weights = [1.0] * len(ids)
    if "labels" in row:
        used.add("labels")
        labels = _numbers(row, "labels", len(ids))
        if any(
            label not in (-100, one) for label, one in zip(labels, ids, strict=True)
        ):
            raise DataError(
                "'labels' has ids that are not those of 'input_ids' at the same places; "
                "labels are not shifted, and -100 where nothing is learnt"
            )
        weights = [float(label != -100) for label in labels]
    for key in ("completion_mask", "assistant_masks"):
        if row.get(key) is not None:
            used.add(key)
            mask = _numbers(row, key, len(ids))
            weights = [w * bool(m) for w, m in zip(weights, mask, strict=True)]
    if row.get("attention_mask") is not None:
        shown = _numbers(row, "attention_mask", len(ids))
        kept = [i for i, one in enumerate(shown) if one]
        if kept and kept != list(range(kept[0], kept[-1] + 1)):
            raise DataError("'attention_mask' hides tokens between others")
        ids, weights = [ids[i] for i in kept], [weights[i] for i in kept]
    if not ids:
        raise DataError("'attention_mask' hides every token")
    return [Ids(ids, weights)], used


def _numbers(row: Mapping[str, Any], key: str, count: int | None = None) -> list[int]:
    values = _listed(row[key])
    if isinstance(values, str) and values.startswith("["):
        try:
            values = json.loads(values)
        except ValueError:
            pass
    if not isinstance(values, list) or not all(isinstance(one, int) for one in values):
        raise DataError(f"{key!r} is no list of whole numbers")
    if count is not None and len(values) != count:
        raise DataError(f"{key!r} is not as long as 'input_ids'")
    return values


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Returns the first key that a row has something under, else one that it has."""
    has = [key for key in keys if key in row]
    return next((key for key in has if row[key]), has[0] if has else None)


def _preference(row: Mapping[str, Any]) -> str:
    """Says how to learn the chosen answers of a row that has two."""
    asked = next(
        (key for key in ("instruction", "input", *_ASKING) if key in row), None
    )
    if asked in ("instruction", "input"):
        way = "output=chosen"
    elif asked is not None:
        prompt = "" if asked == "prompt" else f"prompt={asked} "
        way = f"{prompt}completion=chosen"
    else:
        way = "text=chosen" if isinstance(row["chosen"], str) else "messages=chosen"
    return (
        "is a preference row ('chosen' and 'rejected'), which needs another objective than "
        f"to learn texts; to train on what was chosen alone: --data.columns {way}"
    )


def _unknown(row: Mapping[str, Any]) -> str:
    """Says what a row has, and the flag that may make it one of a known form."""
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    text = f"has {_keys(row)}; expected {EXPECTED}"
    lower = {str(key).lower(): key for key in row}
    ask = next((lower[key] for key in ("input", *_ASKING) if key in lower), None)
    say = next((lower[key] for key in ("output", *_ANSWERING) if key in lower), None)
    if ask is not None and say is not None:
        pairs = [("input", ask), ("output", say)]
        flags = " ".join(f"{to}={key}" for to, key in pairs if to != key)
        return f"{text}. To read them so: --data.columns {flags}"
    known = ("messages", "conversations", "text", "input", "output", "instruction")
    near = {
        name: lower[close[0]]
        for name in known
        if (close := difflib.get_close_matches(name, lower, n=1, cutoff=0.8))
        and lower[close[0]] != name
    }
    if near:
        flags = " ".join(f"{to}={key}" for to, key in near.items())
        return f"{text}. If these are meant: --data.columns {flags}"
    return text


EXPECTED = (
    "'input' and 'output', 'instruction' and 'output', 'messages', 'conversations', "
    "'prompt' and 'completion', 'text', or 'input_ids'"
)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"
