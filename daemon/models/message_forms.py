"""The forms in which a chat template takes messages, found by rendering small conversations.

Templates differ: for some, `content` is a string; others loop over typed parts, and a string gives no text at all;
some take both. Most want the arguments of a tool call as an object, some as JSON text. A template does not say which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_WORD = "zebra7"
_UNQUOTED = re.compile(rf"(?<!['\"]){_WORD}")  # quoted, it is the text of a Python list, not of a message

Messages = list[dict[str, Any]]


class MessageForms:
    """What one template takes: by role, content as a string or as parts; and arguments as an object or as text."""

    def __init__(self, render: Callable[[Messages], str]) -> None:
        """`render` renders messages with the template. It may raise any exception."""
        self._render = render
        self._takes_text: dict[str, bool] = {}
        self._takes_parts: dict[str, bool] = {}
        self.object_arguments = True
        for role in ("user", "system", "assistant"):
            self._probe_content(role)
        self.object_arguments = self._shows_arguments({_WORD: "x"}) or not self._shows_arguments(
            f'{{"{_WORD}": "x"}}'
        )
        self._probe_content("tool")

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in the form that the template takes.

        `content` is a string, a list of typed parts of text, or None; the `arguments` of tool calls are objects.
        Parts become one string with a newline between two parts.
        """
        content = message.get("content") or ""
        role = message["role"]
        if isinstance(content, list):
            if not self._takes_parts.get(role, False):
                content = "\n".join(part["text"] for part in content)
        elif not self._takes_text.get(role, True):
            content = [{"type": "text", "text": content}] if content else []
        adapted = message | {"content": content}
        if not self.object_arguments and message.get("tool_calls"):
            adapted["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return adapted

    def _probe_content(self, role: str) -> None:
        text, parts = _WORD, [{"type": "text", "text": _WORD}]
        with_text, with_parts = (self._try(self._conversation(role, content)) for content in (text, parts))
        takes_text = _WORD in with_text
        takes_parts = bool(_UNQUOTED.search(with_parts)) or (takes_text and with_parts == with_text)
        if not takes_text and not takes_parts:  # a role that the template does not know
            takes_text, takes_parts = self._takes_text.get("user", True), self._takes_parts.get("user", False)
        self._takes_text[role], self._takes_parts[role] = takes_text, takes_parts

    def _conversation(self, role: str, content: Any) -> Messages:
        user = self.adapt({"role": "user", "content": "x"}) if role != "user" else {}
        message = {"role": role, "content": content}
        match role:
            case "user":
                return [message]
            case "system":
                return [message, user]
            case "assistant":
                return [user, message, user]
        return [user, self._tool_call({"a": "b"}), message | {"tool_call_id": "000000000", "name": "f"}]

    def _shows_arguments(self, arguments: Any) -> bool:
        user, answer = {"role": "user", "content": "x"}, {"role": "tool", "content": "x"}
        last = self.adapt(answer) | {"tool_call_id": "000000000", "name": "f"}
        return _WORD in self._try([self.adapt(user), self._tool_call(arguments), last])

    def _tool_call(self, arguments: Any) -> dict[str, Any]:
        call = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": arguments}}
        message = self.adapt({"role": "assistant", "content": ""})
        return message | {"tool_calls": [call]}

    def _try(self, messages: Messages) -> str:
        try:
            return self._render(messages)
        except Exception:  # a template refuses what it does not know in many ways
            return ""


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
