"""The Jinja environment of chat templates: as in Transformers, sandboxed, and with strings that keep their origin.

A template is untrusted code, which can only compute text here; the size of products is limited. Every way from
strings to a new string is in this file or in `tracked_text`: output, operators, methods, filters, macros and blocks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from daemon.models import tracked_text
from daemon.models.tracked_text import TrackedText, holds_tracked, to_text

MAX_STEPS = 100_000  # in all `range` calls of one rendering, and in the length of a product
# Filters that return some of the objects that they get, or no text. All others make new text.
_CHOOSING_FILTERS = frozenset(
    {
        *("abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items"),
        *("last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round"),
        *("select", "selectattr", "slice", "sort", "sum", "unique", "wordcount"),
    }
)


class ChatError(ValueError):
    """The messages cannot be rendered. The text of the error is for the client."""


class MessagesRefused(ChatError):
    """The template does not take these messages. It may take another form of them."""


def new_environment() -> jinja2.Environment:
    """Return an environment for one chat template."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_finalize
    )
    del environment.globals["lipsum"]  # it makes text of any length
    environment.filters |= {"join": _join, "replace": _replace, "format": _format, "string": to_text}
    environment.filters["tojson"] = _to_json
    environment.filters |= {n: _text_maker(f) for n, f in environment.filters.items() if n not in _CHOOSING_FILTERS}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _text_maker(lambda form: datetime.now().strftime(form))
    return environment


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Compile ``a ~ b``. Jinja's own code joins plain strings."""
        self.write("environment.join_values((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of Jinja prevents access to Python objects, but not ``'a' * 10**12``."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"*", "**", "%"})
    concat = staticmethod(tracked_text.concat)

    def join_values(self, values: tuple[Any, ...]) -> str:
        return tracked_text.concat(map(to_text, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(v, int | float) for v in (left, right))
        if operator == "**" and not (numbers and abs(left) <= MAX_STEPS and abs(right) <= 64):
            raise ChatError("the chat template computes a value that is too large")
        if operator == "*" and not numbers and _extent(left) * _extent(right) > MAX_STEPS:
            raise ChatError("the chat template computes a value that is too large")
        if operator == "%" and isinstance(left, str):
            return tracked_text.format_percent(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if not isinstance(owner, str | bytes):
            return super().call(context, obj, *args, **kwargs)
        if type(owner) is str and obj.__name__ in ("join", "replace"):
            obj = getattr(TrackedText(owner, bytes(len(owner))), obj.__name__)
        result = super().call(context, obj, *args, **kwargs)
        # A method that TrackedText leaves to str. Bytes may come from a string of a client.
        if isinstance(owner, TrackedText | bytes) or holds_tracked((args, kwargs)):
            return _as_clients(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def format_(*args: Any, **kwargs: Any) -> str:
            return tracked_text.format_braces(value.__self__, args, kwargs, wrapped)

        return format_


def _extent(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else int(value)


def _finalize(value: Any) -> Any:
    """Prepare the value of an expression for ``str``, which the compiled template applies to it."""
    return value if isinstance(value, str) else to_text(value)


def _text_maker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, with its result as a client's text if an argument is, unless it keeps the origin itself."""

    @functools.wraps(function)  # also copies the marks by which Jinja passes its environment
    def made(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, Markup):
            result = str.__str__(result)  # nothing is escaped here, so it is a string like others
        return _as_clients(result) if holds_tracked((args, kwargs)) else result

    return made


def _as_clients(value: Any) -> Any:
    """Return `value` with its plain strings as a client's."""
    if isinstance(value, list | tuple):
        return type(value)(map(_as_clients, value))
    return TrackedText(value) if isinstance(value, str) and not isinstance(value, TrackedText) else value


class _Generation(Extension):
    """The tag `{% generation %}`, which marks assistant text for training. Here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  declared like this in jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # The `tojson` of Jinja escapes HTML. Models are trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return tracked_text.join(to_text(d), map(to_text, value))


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = to_text(s)
    return TrackedText(text, tracked_text.origin(text)).replace(
        to_text(old), to_text(new), -1 if count is None else count
    )


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return tracked_text.format_percent(to_text(value), kwargs or args)
