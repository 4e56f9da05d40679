"""Chat templates: render messages as the prompt format that the model was trained on.

A template is part of a model and is untrusted code. It runs in a sandbox, where it can only compute text. The length
of its output, the steps of its loops over ranges and the size of its products are limited. Clients cannot send one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from daemon.models.files import ModelError, read_json
from daemon.models.special_tokens import NAMES, special_tokens

MAX_OUTPUT = 16 << 20  # characters; twice the default of max_body
MAX_STEPS = 100_000  # in all `range` calls of one rendering
_OWN_VARIABLES = frozenset((*NAMES, "messages", "add_generation_prompt", "tools", "documents", "self"))


class ChatError(ValueError):
    """The messages cannot be rendered. The text of the error is for the client."""


class ChatTemplate:
    """The chat template of a model directory, from chat_template.jinja or otherwise from tokenizer_config.json.

    `available` is False if the model has no template. `variables` are the names that the template reads and that a
    request may set. Raises ModelError if the template does not compile.
    """

    def __init__(self, path: Path) -> None:
        config = read_json(path / "tokenizer_config.json") or {}
        source = _source(path, config)
        self.available = source is not None
        self._special = special_tokens(path)
        environment = _environment()
        try:
            self._template = environment.from_string(source or "")
            read = meta.find_undeclared_variables(environment.parse(source or ""))
        except jinja2.TemplateSyntaxError as e:
            raise ModelError(f"{path}: the chat template does not compile, line {e.lineno}: {e.message}") from None
        self.variables = read - environment.globals.keys() - _OWN_VARIABLES

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the prompt. `variables` (for example `tools`) are passed to the template.

        They cannot replace the built-in variables: `messages`, `add_generation_prompt`, `range` and special tokens.
        The prompt contains its special tokens: encode it with add_special=False. Raises ChatError.
        """
        if not self.available:
            raise ChatError("this model has no chat template; use /v1/completions")
        given = {"tools": None, "documents": None} | variables | self._special
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt, "range": _bounded_range()}
        try:
            return _collect(self._template.generate(given))
        except ChatError:
            raise
        except jinja2.TemplateError as e:
            raise ChatError(f"the chat template refuses these messages: {e}") from None
        except Exception as e:  # a template can fail in any way on messages that it does not expect
            raise ChatError(f"the chat template fails on these messages: {type(e).__name__}: {e}") from None


def _source(path: Path, config: dict[str, Any]) -> str | None:
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"cannot read {path / 'chat_template.jinja'}: {e}") from None
    value = config.get("chat_template")
    if isinstance(value, list):  # several templates, each with a name
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _collect(chunks: Any) -> str:
    out: list[str] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_OUTPUT:
            raise ChatError(
                f"the chat template makes more text from these messages than the limit of {MAX_OUTPUT} characters"
            )
        out.append(chunk)
    return "".join(out)


def _bounded_range() -> Callable[..., range]:
    """Return a `range` function that allows MAX_STEPS steps in all its calls together."""
    remaining = MAX_STEPS

    def bounded(*args: int) -> range:
        nonlocal remaining
        steps = range(*args)
        remaining -= len(steps)
        if remaining < 0:
            raise ChatError(f"the chat template loops more than {MAX_STEPS} times")
        return steps

    return bounded


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja environment as in Transformers, with a limit on products.

    The sandbox of Jinja prevents access to Python objects, but not `'a' * 10**12`.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(v, int | float) for v in (left, right))
        if operator == "**" and not (numbers and abs(left) <= MAX_STEPS and abs(right) <= 64):
            raise ChatError("the chat template computes a value that is too large")
        if operator == "*" and not numbers and _extent(left) * _extent(right) > MAX_STEPS:
            raise ChatError("the chat template computes a value that is too large")
        return super().call_binop(context, operator, left, right)


def _extent(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else int(value)


class _Generation(Extension):
    """The tag `{% generation %}`, which marks assistant text for training. Here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  declared like this in jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    del environment.globals["lipsum"]  # it makes text of any length
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


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
