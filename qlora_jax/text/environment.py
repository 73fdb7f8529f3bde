"""Runs chat templates in transformers' environment, in a sandbox with limits.

Templates are programs that come with a download. Jinja's immutable sandbox keeps them from
what lies outside their variables. The limits here end those that would not end by
themselves: a template may make MAX_STEPS rounds of its loops and calls, and write
MAX_CHARACTERS.

Source: transformers 5.24, utils/chat_template_utils.py (_compile_jinja_template).
"""

import contextvars
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from qlora_jax.text import clock

MAX_STEPS = 2_000_000
"""Rounds of loops in one rendering; a call of a function counts as CALL of them."""

CALL = 10

MAX_CHARACTERS = 32_000_000
"""Length of one rendering, and of a text that is repeated by `*`."""


class Rendering:
    """What is known of a rendering while it goes on.

    Attributes:
      marks: (start, end) of each generation block in the text.
      length: Characters written so far.
    """

    def __init__(self):
        self.marks: list[tuple[int, int]] = []
        self.length = 0
        self._steps = 0

    def step(self, count: int = 1) -> None:
        """Counts rounds of loops, and calls."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise jinja2.TemplateError(f"it takes more than {MAX_STEPS} steps")

    def write(self, block: str) -> None:
        """Counts characters."""
        self.length += len(block)
        if self.length > MAX_CHARACTERS:
            raise jinja2.TemplateError(
                f"it writes more than {MAX_CHARACTERS} characters"
            )


CURRENT: contextvars.ContextVar[Rendering] = contextvars.ContextVar("rendering")


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: renders its body, and remembers where in the text it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parses the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, run = caller(), CURRENT.get()
        run.marks.append((run.length, run.length + len(text)))
        return text


class _CountLoops(jinja2.visitor.NodeTransformer):
    """Sends what each loop goes over through `Environment.counted`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        counted = jinja2.nodes.EnvironmentAttribute("counted")
        call = jinja2.nodes.Call(counted, [node.iter], [], None, None)
        node.iter = call.set_lineno(node.lineno)
        return node


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of all chat templates."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _CountLoops().visit(super()._parse(source, name, filename))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function for a template."""
        if (run := CURRENT.get(None)) is not None:
            run.step(CALL)
        return super().call(context, obj, *args, **kwargs)

    def counted(self, values: Any) -> Any:
        """Returns what a loop goes over, counted."""
        run = CURRENT.get(None)
        if run is None:
            return values
        if hasattr(values, "__len__"):
            run.step(len(values))
            return values
        if isinstance(values, Iterable) and not isinstance(values, jinja2.Undefined):
            return _each(values, run)
        return values

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes `*` and `**` for a template."""
        sizes = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
        counts = [abs(x) for x in (left, right) if isinstance(x, int)]
        if operator == "*" and sizes and counts:
            if sizes[0] * counts[0] > MAX_CHARACTERS:
                raise jinja2.TemplateError(f"it repeats to over {MAX_CHARACTERS}")
        if operator == "**" and any(count > 1000 for count in counts):
            raise jinja2.TemplateError("it computes a power of over 1000")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without the attributes of Python's internals."""

    def __init__(*args: Any, **kwargs: Any):  # so that namespace(self=...) works
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"it sets {name!r} on a namespace")


def _each(values: Iterable[Any], run: Rendering) -> Iterator[Any]:
    for value in values:
        run.step()
        yield value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002
    return clock.now().strftime(format)


@functools.cache
def environment() -> Environment:
    """Returns the environment; one serves all templates."""
    return Environment()


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Compiles a template, once for each source.

    Raises:
      jinja2.TemplateError: its syntax is wrong.
    """
    return environment().from_string(source)


@functools.lru_cache(maxsize=64)
def names_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns (variables that a template takes, names of fields that it may read).

    The names are its attributes and its string constants: `m.name`, `m['name']` and
    `m.get('name')` alike.
    """
    tree = environment().parse(source)
    variables = jinja2.meta.find_undeclared_variables(tree)
    fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    for node in tree.find_all(jinja2.nodes.Const):
        if isinstance(node.value, str):
            fields.add(node.value)
    own = {"messages", "add_generation_prompt", *environment().globals}
    return frozenset(variables - own), frozenset(fields)


def render(template: jinja2.Template, values: dict[str, Any]) -> tuple[str, Rendering]:
    """Returns a template's text, and where its generation blocks stand in it.

    Raises:
      Exception: any that a template can cause.
    """
    run = Rendering()
    token = CURRENT.set(run)
    try:
        blocks = []
        for block in template.generate(values):
            run.write(block)
            blocks.append(block)
        return "".join(blocks), run
    finally:
        CURRENT.reset(token)
