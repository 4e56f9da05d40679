"""Grammars of tool calls, in the form that the model of this server writes them. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from daemon.api.errors import bad_request
from daemon.api.parse.formats import LLAMA, MISTRAL
from daemon.models.grammar.source import schema_options

MAX_CALLS = 16
"""Of one answer whose calls are enforced: a small model may not find the end."""

TokenId = Callable[[str], int | None]
_EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_rules(
    tools: Sequence[dict[str, Any]], names: Sequence[str], tool_format: str, *, parallel: bool, token_id: TokenId
) -> str:
    """Return Lark rules. `calls` matches calls of the tools of these `names`, as `write_calls` writes them.

    `tools`: as a request has them, checked. `token_id`: id of the token of a marker; None if it is text. Keywords of
    the schemas that cannot be enforced count only if all of these tools are strict. Raises ApiError (400).
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    called = {name: functions[name] for name in names}
    try:
        return _rules(called, tool_format, parallel, token_id)
    except RecursionError:
        raise bad_request("The schemas of the tools are nested too deeply.", "tools") from None


def marker(text: str, token_id: TokenId) -> str:
    """Return a marker as Lark takes it: its token, or its text."""
    token = token_id(text)
    return _text(text) if token is None else f"<[{token}]>"


def _rules(functions: dict[str, dict[str, Any]], tool_format: str, parallel: bool, token_id: TokenId) -> str:
    options = schema_options(lenient=not all(function.get("strict") for function in functions.values()))
    most = MAX_CALLS if parallel else 1

    def calls(call: str, between: str) -> str:
        return f"{call} ({between} {call}){{0,{most - 1}}}" if parallel else call

    if tool_format == MISTRAL and token_id("[ARGS]") is not None:
        begin, args = (marker(text, token_id) for text in ("[TOOL_CALLS]", "[ARGS]"))
        schemas = {name: json.dumps(_arguments(function) | options) for name, function in functions.items()}
        each = [f"{begin} {_text(name)} {args} %json {schema}" for name, schema in schemas.items()]
        return f"call: {' | '.join(each)}\ncalls: {calls('call', '')}\n"
    schema = _call_schema(functions, "parameters" if tool_format == LLAMA else "arguments")
    call = f"call: %json {json.dumps(schema | options)}\n"
    match tool_format:
        case "hermes":
            begin, end = marker("<tool_call>", token_id), marker("</tool_call>", token_id)
            return call + f'one: {begin} "\\n" call "\\n" {end}\ncalls: {calls("one", _text(chr(10)))}\n'
        case "llama3_json":
            return call + f"calls: {calls('call', _text('; '))}\n"
        case "mistral":
            begin = marker("[TOOL_CALLS]", token_id)
            return call + f'calls: {begin} "[" {calls("call", _text(", "))} "]"\n'
    one_or_list: list[dict[str, Any]] = [{"$ref": "#/$defs/call"}]
    if parallel:
        one_or_list.append({"type": "array", "items": one_or_list[0], "minItems": 1, "maxItems": most})
    defs = schema.pop("$defs") | {"call": schema}
    return f"calls: %json {json.dumps({'anyOf': one_or_list, '$defs': defs} | options)}\n"


def _call_schema(functions: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """Return the schema of one call, an object with the name and the arguments."""
    defs, calls = {}, []
    for i, (name, function) in enumerate(functions.items()):
        defs[f"args{i}"] = _moved(_arguments(function), f"#/$defs/args{i}")
        properties = {"name": {"const": name}, key: {"$ref": f"#/$defs/args{i}"}}
        calls.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    return {"anyOf": calls, "$defs": defs}


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = function.get("parameters") or _EMPTY
    return schema if "type" in schema or "$ref" in schema else {"type": "object"} | schema


def _moved(schema: Any, to: str) -> Any:
    """Return a schema that stands at `to`, so that its references still name its own parts."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in ("const", "enum") else _moved(value, to) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = to + reference[1:]
    return moved


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
