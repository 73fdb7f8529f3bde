"""A prompt that is made of a row's fields (`--data.prompt-template`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from qlora_jax.data.fields import keys_of
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.inputs import read_text
from qlora_jax.text.environment import environment, names_in, render


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
                f"has {keys_of(row)}; --data.prompt-template: {error.message}"
            ) from None
        except Exception as error:  # a template can fail in any way that Python can
            raise DataError(
                f"--data.prompt-template refuses the row: {error}"
            ) from None
