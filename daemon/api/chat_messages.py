"""From the messages of a request to what a chat template gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from daemon.api.errors import bad_request
from daemon.api.schemas import Message
from daemon.models.message_forms import MessageForms
from daemon.models.tracked_text import track


def for_template(
    messages: list[Message],
    forms: MessageForms,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Return the messages as dicts, in the forms that the template takes. `change`: applies to the list before that.

    Raises ApiError (400) for arguments of a tool call that are no JSON object.
    """
    given = [_as_dict(message, i) for i, message in enumerate(messages)]
    return [forms.adapt(message) for message in (change(given) if change else given)]


def parts_of(message: Message) -> list[str]:
    """Return the texts of a message, one for each of its parts."""
    content = message.content or ()
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part.text or part.refusal or "" for part in content]


def track_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with their strings as TrackedText. Not their roles: `validation` has checked these."""
    return [{k: v if k == "role" else track(v) for k, v in message.items()} for message in messages]


def _as_dict(message: Message, i: int) -> dict[str, Any]:
    content: Any = message.content or None
    if isinstance(content, list):
        content = [{"type": "text", "text": text} for text in parts_of(message)]
    # Most templates do not know `developer`, the newer name of `system`.
    role = "system" if message.role == "developer" else message.role
    # An empty list means no calls, but a template may ask whether the key is there.
    calls = (message.tool_calls or None) and [
        _with_object(call, f"messages.[{i}].tool_calls.[{j}].function.arguments")
        for j, call in enumerate(message.tool_calls)
    ]
    given: dict[str, Any] = {"name": message.name, "tool_calls": calls, "tool_call_id": message.tool_call_id}
    # Templates know one name or the other.
    given["reasoning"] = given["reasoning_content"] = message.reasoning or message.reasoning_content
    return {"role": role, "content": content} | {k: v for k, v in given.items() if v is not None}


def _with_object(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a tool call with the JSON text of its arguments as the object that it stands for.

    No text, and the text `null`, are what some clients write for a call without arguments.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        where = where.removesuffix(".arguments")
        raise bad_request("A tool call needs a `function` with a `name` and `arguments`.", where)
    value = function.get("arguments")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = ""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise bad_request("The `arguments` of a tool call must be a JSON object, or the text of one.", where)
    return call | {"function": function | {"arguments": value}}
