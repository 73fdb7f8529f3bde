"""Runs chat templates in transformers' environment, in a sandbox with limits.

Templates are programs that come with a download. Jinja's immutable sandbox keeps them from
what lies outside their variables. The limits of text/limits.py end those that would not end by
themselves, or would fill the memory: loops, calls, filters, operators, values that are made and
text that is written pass through the methods here. Nothing is computed when a template is
compiled, where no limit counts.

Source: transformers 5.24, utils/chat_template_utils.py (_compile_jinja_template).
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
from jinja2.utils import _PassArg

from qlora_jax.text import clock
from qlora_jax.text.limits import (
    A_STEP,
    CALL,
    CURRENT,
    MAX_SOURCE,
    Rendering,
    each,
    size_of,
    widths,
)

_GROWING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format"}
    | {"format_map", "translate", "strftime_now"}
)
"""Methods and functions whose result may be larger than all that they are given."""

_PLAIN = frozenset({"default", "d", "int", "float", "abs", "length", "count", "attr"})
"""Filters whose result is no larger than what they are given."""


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


class _Limited(jinja2.visitor.NodeTransformer):
    """Sends loops, and what makes values, through methods of the environment.

    Text in blocks whose output is a value (macros, `{% set %}`) becomes an expression, which
    is counted where it is put out; all other text is counted by `render`.
    """

    def __init__(self) -> None:
        self._blocks = 0

    def visit_For(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through("counted", [node.iter], node)
        return node

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _through("concatenated", node.nodes, node)

    def visit_Compare(self, node: Any) -> Any:  # noqa: N802
        return _through("compared", [self.generic_visit(node)], node)

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        made = self.generic_visit(node)
        return _through("made", [made], node) if type(node.arg) is _Slice else made

    def _value(self, node: Any) -> Any:
        made = self.generic_visit(node)
        # On the left of an assignment, a tuple is nothing that is made.
        loads = getattr(node, "ctx", "load") == "load"
        return _through("made", [made], node) if loads else made

    visit_List = visit_Tuple = visit_Dict = _value

    def visit_TemplateData(self, node: Any) -> Any:  # noqa: N802
        if not self._blocks:
            return node
        return jinja2.nodes.Const(node.data).set_lineno(node.lineno)

    def _block(self, node: Any) -> Any:
        self._blocks += 1
        made = self.generic_visit(node)
        self._blocks -= 1
        return made

    visit_Macro = visit_AssignBlock = visit_FilterBlock = visit_CallBlock = _block


_Slice = jinja2.nodes.Slice


def _through(method: str, values: list[Any], node: Any) -> jinja2.nodes.Node:
    """Returns a call of a method of the environment."""
    attribute = jinja2.nodes.EnvironmentAttribute(method)
    call = jinja2.nodes.Call(attribute, values, [], None, None)
    call.set_environment(node.environment)
    return call.set_lineno(node.lineno, override=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of all chat templates."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=_put_out,
            optimized=False,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited(name, f) for name, f in self.filters.items()}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # which makes up as much text as it is asked for

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Limited().visit(super()._parse(source, name, filename))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function for a template."""
        if getattr(obj, "__self__", None) is self:  # what _through has put there
            return obj(*args)
        if (run := CURRENT.get(None)) is None:
            return super().call(context, obj, *args, **kwargs)
        own = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        run.step(CALL + size_of(own) // A_STEP)
        if (name := getattr(obj, "__name__", "").lstrip("_")) in _GROWING:
            value, others = (own, args) if own is not None else (args[:1], args[1:])
            if "format" in name or name == "strftime_now":
                others = (*others, *widths(value))
            run.product(value, [*others, *kwargs.values()])
        return run.made(super().call(context, obj, *args, **kwargs))

    def counted(self, values: Any) -> Any:
        """Returns what a loop goes over, counted."""
        if (run := CURRENT.get(None)) is None:
            return values
        if hasattr(values, "__len__"):
            run.step(len(values))
        elif isinstance(values, Iterable) and not isinstance(values, jinja2.Undefined):
            return each(values, run)
        return values

    def compared(self, value: Any) -> Any:
        """Returns the result of a comparison, which counts as a step."""
        if (run := CURRENT.get(None)) is not None:
            run.step()
        return value

    def made(self, value: Any) -> Any:
        """Returns a value that a template has made, when it is not too large."""
        run = CURRENT.get(None)
        return value if run is None else run.made(value)

    def concatenated(self, *values: Any) -> str:
        """Returns texts one after another, as `~` does."""
        texts = (x if isinstance(x, str) else str(self.made(x)) for x in values)
        return self.made("".join(texts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes with two values for a template."""
        if (run := CURRENT.get(None)) is None:
            return super().call_binop(context, operator, left, right)
        if operator == "*" and isinstance(right, (str, list, tuple)):
            run.product(right, [left])
        elif operator == "*" and isinstance(left, (str, list, tuple)):
            run.product(left, [right])
        elif operator == "%" and isinstance(left, str):
            given = right if isinstance(right, tuple) else (right,)
            run.product(left, [*given, *widths(left)])
        elif operator == "**":
            run.power(left, right)
        return run.made(super().call_binop(context, operator, left, right))


@jinja2.pass_context
def _put_out(context: Any, value: Any) -> Any:
    """Counts what an expression writes.

    As it takes the context, the compiler computes no expression beforehand.
    """
    run = CURRENT.get(None)
    if run is None or isinstance(value, jinja2.Undefined):
        return value
    text = value if isinstance(value, str) else str(run.made(value))
    run.step()
    run.write(len(text))
    return text


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that is held to the limits, and that the compiler leaves alone."""
    takes = _PassArg.from_obj(function)

    @jinja2.pass_context
    @functools.wraps(function)
    def limited(context: Any, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        given: tuple[Any, ...] = ()
        if takes is _PassArg.context:
            given = (context,)
        elif takes is _PassArg.eval_context:
            given = (context.eval_ctx,)
        elif takes is _PassArg.environment:
            given = (context.environment,)
        run = CURRENT.get(None)
        if run is None or name in _PLAIN:
            return function(*given, value, *args, **kwargs)
        run.step(CALL + size_of(value) // A_STEP)
        others = [*args, *kwargs.values()]
        if name == "format":
            others += widths(value)
        elif name == "sum" and any(isinstance(x, (list, tuple)) for x in others):
            others.append(value)  # which copies what it has at each item
        run.product(value, others)
        return run.made(function(*given, value, *args, **kwargs))

    return limited


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


@contextlib.contextmanager
def _compiling(source: str) -> Iterator[None]:
    """Raises jinja2.TemplateError for whatever a template makes its compiler stumble over."""
    if len(source) > MAX_SOURCE:
        raise jinja2.TemplateError(
            f"it has {len(source)} characters, expected at most {MAX_SOURCE}"
        )
    try:
        yield
    # Python refuses what is nested too deeply in one of these ways, and long numbers.
    except (
        RecursionError,
        MemoryError,
        SyntaxError,
        ValueError,
        OverflowError,
    ) as error:
        raise jinja2.TemplateError(f"it cannot be compiled: {error}") from None


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Compiles a template, once for each source.

    Raises:
      jinja2.TemplateError: its syntax is wrong.
    """
    with _compiling(source):
        return environment().from_string(source)


@functools.lru_cache(maxsize=64)
def names_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns (variables that a template takes, names of fields that it may read).

    The names are its attributes and its string constants: `m.name`, `m['name']` and
    `m.get('name')` alike.
    """
    with _compiling(source):
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
            run.length += len(block)
            run.write(len(block))
            blocks.append(block)
        return "".join(blocks), run
    finally:
        CURRENT.reset(token)
