"""The tools of a request: which its answer may call, which it must, and how a prompt tells the model of them.

The chat template of a model that was trained on tools takes them. For other models a system message describes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from daemon.api.errors import bad_request
from daemon.api.parse.formats import write_calls
from daemon.api.schemas import ToolChoice

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_CHOICES = ("none", "auto", "required")

_DESCRIPTION = """You can call functions. These are their descriptions, one JSON object a line:

{tools}

To call a function, answer like this, and write nothing else:
{one}
To call two:
{two}
To call none, answer in plain text."""
_EXAMPLE = '{"NAME OF A PARAMETER": "ITS VALUE"}'


class ToolUse(NamedTuple):
    """What a request says of tools. `tools`: all that the model knows, as they were sent.

    `names`: of those that it may call. `must`: it has to call one. `named`: the request names the one to call.
    """

    tools: list[dict[str, Any]]
    names: tuple[str, ...]
    must: bool = False
    named: bool = False
    parallel: bool = True


def tool_use(tools: list[dict[str, Any]] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """Return what a request says of tools; None if its answer may call none. Raises ApiError (400)."""
    if choice == "none":
        return None
    if not tools:
        if choice not in (None, "auto"):
            raise bad_request("`tool_choice` needs `tools`.", "tool_choice")
        return None
    use = ToolUse(tools, _names(tools), parallel=parallel is not False)
    if choice is None or choice == "auto":
        return use
    if choice == "required":
        return use._replace(must=True)
    if isinstance(choice, str):
        raise bad_request(f"`tool_choice` must be one of {', '.join(_CHOICES)}, or an object.", "tool_choice")
    if choice.get("type") == "allowed_tools":
        return _allowed(use, choice)
    return _only(use, [_function_name(choice, "tool_choice", "tool_choice")])._replace(must=True, named=True)


def _names(tools: list[dict[str, Any]]) -> tuple[str, ...]:
    names: list[str] = []
    for i, tool in enumerate(tools):
        where = f"`tools[{i}].function"
        name = _function_name(tool, f"tools[{i}]", "tools")
        if not _NAME.fullmatch(name):
            raise bad_request(f"{where}.name` must be 1 to 128 letters, digits and `_.:/-`.", "tools")
        if name in names:
            raise bad_request(f"{where}.name` is `{name}`, and so is that of an earlier tool.", "tools")
        if not isinstance(tool["function"].get("parameters"), dict | None):
            raise bad_request(f"{where}.parameters` must be a JSON schema, an object.", "tools")
        if not isinstance(tool["function"].get("description"), str | None):
            raise bad_request(f"{where}.description` must be a string.", "tools")
        names.append(name)
    return tuple(names)


def _function_name(given: dict[str, Any], where: str, param: str) -> str:
    """Return the name in ``{"type": "function", "function": {"name": ...}}``."""
    if given.get("type") != "function":
        message = f"`{where}.type` must be `function`; other types of tools are not supported."
        raise bad_request(message, param, "unsupported_parameter")
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request(f"`{where}.function` must be an object with a `name`.", param)
    return name


def _allowed(use: ToolUse, choice: dict[str, Any]) -> ToolUse:
    """Read ``{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}``."""
    param = "tool_choice"
    allowed = choice.get("allowed_tools")
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(allowed, dict) or not isinstance(tools, list) or not tools:
        raise bad_request("`tool_choice.allowed_tools` must be an object with `mode` and a list of `tools`.", param)
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise bad_request("`tool_choice.allowed_tools.mode` must be auto or required.", param)
    given = [tool if isinstance(tool, dict) else {} for tool in tools]
    names = [_function_name(tool, f"tool_choice.allowed_tools.tools[{i}]", param) for i, tool in enumerate(given)]
    return _only(use, names)._replace(must=mode == "required")


def _only(use: ToolUse, names: list[str]) -> ToolUse:
    for name in names:
        if name not in use.names:
            raise bad_request(f"`tool_choice` names `{name[:128]}`, which `tools` has not.", "tool_choice")
    return use._replace(names=tuple(names))


def describe(
    messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]], tool_format: str
) -> list[dict[str, Any]]:
    """Return the messages for a chat template that does not take tools.

    The system message describes the tools. Calls become text of the assistant, and results messages of the user.
    `messages`: as `chat_messages` makes them.
    """
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    one, two = (write_calls(tool_format, [("NAME OF THE FUNCTION", _EXAMPLE)] * count) for count in (1, 2))
    text = _DESCRIPTION.format(tools=lines, one=one, two=two)
    names = {call.get("id"): call["function"]["name"] for m in messages for call in m.get("tool_calls") or ()}
    plain = [_without_tools(message, names, tool_format) for message in messages]
    system = plain[0] if plain[0]["role"] == "system" else None
    rest = plain[1:] if system else plain
    return [_append(system, text) if system else {"role": "system", "content": text}, *rest]


def _append(message: dict[str, Any], text: str) -> dict[str, Any]:
    return message | {"content": _joined(message["content"], text)}


def _joined(first: Any, second: Any) -> Any:
    """Return two contents as one: texts, lists of parts, or None."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    parts = [[{"type": "text", "text": c}] if isinstance(c, str) else c for c in (first, second)]
    return parts[0] + parts[1]


def _without_tools(message: dict[str, Any], names: dict[Any, str], tool_format: str) -> dict[str, Any]:
    if message["role"] == "tool":
        name = message.get("name") or names.get(message.get("tool_call_id"))
        text = f"Result of the function {name}:" if name else "Result of the function:"
        return {"role": "user", "content": _joined(text, message["content"])}
    calls = [
        (call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
        for call in message.get("tool_calls") or ()
    ]
    if not calls:
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return _append(rest, write_calls(tool_format, calls))
