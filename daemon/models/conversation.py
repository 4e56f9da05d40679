"""Conversations that a chat template does not take as they are: they are rendered in a form that it takes.

Many templates refuse two messages of one role in a row, or a system message. And no template leaves a final message
open, so that the model goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from daemon.models.template_sandbox import ChatError, MessagesRefused

Messages = list[dict[str, Any]]

_BETWEEN = "\n\n"  # between the texts of messages that become one
# At the end of a message that is to be continued. The space at its end shows whether the template trims messages.
_HERE = "CONTINUE_THE_MESSAGE_HERE "


def render_any(render: Callable[[Messages], str], messages: Messages) -> str:
    """Return `render` of the messages, or of the first other form of them that the template takes.

    Raises ChatError: for messages that are refused in each form, the error of their own form.
    """
    try:
        return render(messages)
    except MessagesRefused:
        for other in _other_forms(messages):
            try:
                return render(other)
            except MessagesRefused:
                pass
        raise


def render_open(render: Callable[[Messages], str], messages: Messages) -> str:
    """Return `render` of the messages up to the end of the last one's text. Raises ChatError."""
    last, content = messages[-1], messages[-1].get("content") or ""
    text = render([*messages[:-1], last | {"content": _joined(content, _HERE, "")}])
    at = text.rfind(_HERE.rstrip())
    if at < 0:
        raise ChatError("the chat template does not show the text of the last message, so it cannot be continued")
    trimmed = text[at : at + len(_HERE)] != _HERE
    end = content if isinstance(content, str) else content[-1]["text"]
    return text[:at].removesuffix(end[len(end.rstrip()) :]) if trimmed else text[:at]


def _other_forms(messages: Messages) -> Iterator[Messages]:
    """Yield forms with the same text in the same order, the nearest first."""
    merged = _merged(messages)
    if merged != messages:
        yield merged
    if any(message["role"] == "system" for message in messages[1:]):
        yield _merged([messages[0], *_without_system(messages[1:])])
    if any(message["role"] == "system" for message in messages):
        yield _merged(_without_system(messages))


def _merged(messages: Messages) -> Messages:
    """Return the messages with those of one role in a row as one, but tool calls and their results."""
    merged: Messages = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] and _is_text(merged[-1]) and _is_text(message):
            content = _joined(merged[-1].get("content") or "", message.get("content") or "", _BETWEEN)
            merged[-1] = merged[-1] | message | {"content": content}
        else:
            merged.append(message)
    return merged


def _is_text(message: dict[str, Any]) -> bool:
    return message["role"] != "tool" and not message.get("tool_calls")


def _without_system(messages: Messages) -> Messages:
    """Return the messages with those of the system as the user's."""
    return [m | {"role": "user"} if m["role"] == "system" else m for m in messages if _says(m)]


def _says(message: dict[str, Any]) -> bool:
    return message["role"] != "system" or bool(message.get("content"))


def _joined(first: Any, second: Any, between: str) -> Any:
    """Return two contents as one: strings, or lists of typed parts if either is one."""
    if isinstance(first, str) and isinstance(second, str):
        return first + between + second if first and second else first + second
    return [*_parts(first), *_parts(second)] if between else _with_end(_parts(first), second)


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def _with_end(parts: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    if not parts:
        return [{"type": "text", "text": end}]
    return [*parts[:-1], parts[-1] | {"text": parts[-1]["text"] + end}]
