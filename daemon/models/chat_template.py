"""Chat templates: render messages as the prompt format that the model was trained on.

A template is part of a model and is untrusted code. It runs in a sandbox, where it can only compute text. The length
of its output, the steps of its loops over ranges and the size of its products are limited. Clients cannot send one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from daemon.models.files import ModelError
from daemon.models.message_forms import MessageForms
from daemon.models.special_tokens import NAMES, special_tokens
from daemon.models.template_files import DEFAULT, TOOL_USE, read_templates
from daemon.models.template_sandbox import MAX_STEPS, MessagesRefused, new_environment
from daemon.models.template_sandbox import ChatError as ChatError  # noqa: PLC0414  part of this module's interface
from daemon.models.tracked_text import concat

log = logging.getLogger(__name__)

MAX_OUTPUT = 16 << 20  # characters; twice the default of max_body
_OWN_VARIABLES = frozenset((*NAMES, "messages", "add_generation_prompt", "tools", "documents", "self"))


class ChatTemplate:
    """The chat template of a model directory, and a second one for requests with tools if the model has one.

    `available` is False if the model has no template. `forms` are the forms of messages that it takes. `variables`
    are the names that it reads and that a request may set, `own_variables` those that no request may set.
    `takes_tools`: it tells the model of `tools`. `source`: the text of all templates. Raises ModelError if a template
    does not compile.
    """

    def __init__(self, path: Path) -> None:
        sources = read_templates(path)
        source = sources.get(DEFAULT)
        self.available = source is not None
        self.source = "\n".join(sources.values())
        self._special = special_tokens(path)
        self._environment = new_environment()
        self._template, read = self._compile(path, source or "")
        self._tool_template, read_for_tools = self._compile(path, sources.get(TOOL_USE, source or ""))
        self.takes_tools = "tools" in read | read_for_tools
        self.own_variables = self._environment.globals.keys() | _OWN_VARIABLES
        self.variables = (read | read_for_tools) - self.own_variables
        self.forms = MessageForms(self.render)

    def _compile(self, path: Path, source: str) -> tuple[jinja2.Template, set[str]]:
        """Return the template and the names that it reads."""
        try:
            read = meta.find_undeclared_variables(self._environment.parse(source))
            return self._environment.from_string(source), read
        except jinja2.TemplateSyntaxError as e:
            raise ModelError(f"{path}: the chat template does not compile, line {e.lineno}: {e.message}") from None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the prompt. `variables` (for example `tools`) are passed to the template.

        They cannot replace the built-in variables: `messages`, `add_generation_prompt`, `range` and special tokens.
        The prompt contains its special tokens: encode it with add_special=False. If strings in `messages` are
        tracked, the prompt is a TrackedText too. Raises ChatError.
        """
        if not self.available:
            raise ChatError("this model has no chat template; use /v1/completions")
        given = {"tools": None, "documents": None} | variables | self._special
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt, "range": _bounded_range()}
        try:
            template = self._tool_template if given["tools"] else self._template
            return _collect(template.generate(given))
        except ChatError:
            raise
        except RecursionError:
            raise ChatError("these messages are nested too deeply for the chat template") from None
        except jinja2.TemplateError as e:
            raise MessagesRefused(f"the chat template refuses these messages: {e}") from None
        except Exception as e:  # a template can fail in any way on messages that it does not expect
            log.debug(
                "the chat template fails on messages: %r", e
            )  # also when `MessageForms` tries forms at the start
            raise MessagesRefused(
                "the chat template fails on these messages: it does not expect their form"
            ) from None


def _collect(chunks: Iterable[str]) -> str:
    out: list[str] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_OUTPUT:
            raise ChatError(
                f"the chat template makes more text from these messages than the limit of {MAX_OUTPUT} characters"
            )
        out.append(chunk)
    return concat(out)


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
