"""The tools of a Responses request as tools of a chat. Pure.

A tool is a function, or a namespace: a list of functions that share the first part of their names. The model knows a
function in a namespace by both names, with a dot between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from daemon.api.errors import ApiError, bad_request
from daemon.api.render.output_items import InNamespace

Tool = dict[str, Any]

_MEMBERS = ("name", "description", "parameters", "strict")
_CHOICES = ("none", "auto", "required")
_HOSTED = "Tools here are functions that the client calls; this server runs none."


class _Function(NamedTuple):
    """A function, and the namespace that it is in or ""."""

    tool: Tool
    namespace: str


def chat_tools(tools: Sequence[Tool]) -> list[Tool]:
    """Return the functions in the form of a chat. Raises ApiError (400) for tools of other types.

    A search of the web beside functions is left out: agents offer it always, and a model without it goes on with the
    functions. The answer says which tools the model had.
    """
    found = []
    for tool, namespace in _functions(tools):
        members = {name: tool[name] for name in _MEMBERS if tool.get(name) is not None}
        members["name"] = full_name(namespace, tool["name"])
        found.append({"type": "function", "function": members})
    return found


def names_in_namespaces(tools: Sequence[Tool]) -> dict[str, InNamespace]:
    """Return the names of the functions that are in a namespace, by the name that the model knows."""
    return {
        full_name(namespace, tool["name"]): InNamespace(namespace, tool["name"])
        for tool, namespace in _functions(tools)
        if namespace
    }


def full_name(namespace: str | None, name: str) -> str:
    """Return the name that the model knows."""
    return f"{namespace}.{name}" if namespace else name


def repeated_tools(tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools that the model has, as the answer repeats them."""
    found = []
    for tool in tools:
        if tool.get("type") == "namespace":
            inner = [_repeated(function) for function in tool["tools"]]
            found.append(
                {"type": "namespace", "name": tool["name"], "description": _description(tool), "tools": inner}
            )
        elif tool.get("type") == "function":
            found.append(_repeated(tool))
    return found


def chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return `tool_choice` in the form of a chat. Raises ApiError (400)."""
    if not isinstance(choice, dict):
        if choice not in (None, *_CHOICES):
            raise bad_request(f"`tool_choice` must be one of {', '.join(_CHOICES)}, or an object.", "tool_choice")
        return choice
    if choice.get("type") != "allowed_tools":
        return _named(choice, "tool_choice")
    tools = choice.get("tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise bad_request("`tool_choice.tools` must be a list of objects.", "tool_choice")
    named = [_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools)]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": named}}


def _functions(tools: Sequence[Tool]) -> Iterator[_Function]:
    """Yield all functions. Raises ApiError (400) for tools of other types."""
    callable_ = any(tool.get("type") in ("function", "namespace") for tool in tools)
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if kind == "namespace":
            yield from _of_namespace(tool, f"tools[{i}]")
        elif not (callable_ and isinstance(kind, str) and kind.startswith("web_search")):
            yield _Function(_function(tool, f"tools[{i}]"), "")


def _of_namespace(tool: Tool, where: str) -> Iterator[_Function]:
    inner = tool.get("tools")
    if not isinstance(tool.get("name"), str) or not isinstance(inner, list):
        raise bad_request(f"`{where}` needs a `name`, a string, and a list of `tools`.", "tools")
    for j, function in enumerate(inner):
        if not isinstance(function, dict):
            raise bad_request(f"`{where}.tools[{j}]` must be an object.", "tools")
        yield _Function(_function(function, f"{where}.tools[{j}]"), tool["name"])


def _function(tool: Tool, where: str) -> Tool:
    if (kind := tool.get("type")) != "function":
        raise _other_type(kind, where, "tools", " Leave this tool out.")
    if not isinstance(tool.get("name"), str):
        raise bad_request(f"`{where}` needs a `name`, a string.", "tools")
    return tool


def _named(choice: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the choice of one function in the form of a chat."""
    if (kind := choice.get("type")) != "function":
        raise _other_type(kind, where, "tool_choice")
    name, namespace = choice.get("name"), choice.get("namespace")
    if not isinstance(name, str) or not isinstance(namespace, str | None):
        raise bad_request(f"`{where}` needs a `name`, a string.", "tool_choice")
    return {"type": "function", "function": {"name": full_name(namespace, name)}}


def _repeated(tool: Tool) -> Tool:
    return {"type": "function"} | {name: tool.get(name) for name in _MEMBERS}


def _description(tool: Tool) -> str:
    return tool["description"] if isinstance(tool.get("description"), str) else ""


def _other_type(kind: Any, where: str, param: str, advice: str = "") -> ApiError:
    message = f"`{where}.type` is {str(kind)[:64]!r}. {_HOSTED}{advice}"
    return bad_request(message, param, "unsupported_parameter")
