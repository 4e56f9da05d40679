"""From a Responses request to the chat that answers it, and to what the answer repeats of it. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from daemon.api.errors import ApiError, bad_request
from daemon.api.grammar.forms import JsonSchemaFormat, ResponseFormat
from daemon.api.responses.conversation import to_messages
from daemon.api.responses.schema import ResponsesRequest, TextFormat
from daemon.api.schemas import ChatRequest, StreamOptions
from daemon.api.unsupported import refuse_unsupported

LOGPROBS = "message.output_text.logprobs"
# What only tools of OpenAI's servers put into an answer, and the encrypted form of what is here plain text.
_WITHOUT_EFFECT = (
    *("reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"),
    *("web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url"),
    "code_interpreter_call.outputs",
)
_PASSED_ON = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "stop", "ignore_eos", "stream", "skip_special_tokens", "priority"),
    *("cache_salt", "chat_template_kwargs", "parallel_tool_calls", "structured_outputs"),
)
_TOOL_MEMBERS = ("name", "description", "parameters", "strict")
_FORMATS = ("text", "json_object", "json_schema")
_CHOICES = ("none", "auto", "required")
_HOSTED = "Tools here are functions that the client calls; this server runs none."
# Fields of a chat, by what they are called here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_NAMED = re.compile(rf"`({'|'.join(_NAMES)})`")


def to_chat(request: ResponsesRequest) -> ChatRequest:
    """Return the chat whose answer is that of the request. Raises ApiError (400) for what a chat cannot do."""
    refuse_unsupported(request)
    if request.text is not None:
        refuse_unsupported(request.text, "text.")
    logprobs = _wants_logprobs(request)
    return ChatRequest(
        messages=to_messages(request.instructions, request.input),
        max_completion_tokens=request.max_output_tokens,
        logprobs=logprobs or None,
        top_logprobs=request.top_logprobs if logprobs else None,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        tools=[_chat_tool(tool, i) for i, tool in enumerate(request.tools or ())] or None,
        tool_choice=_chat_choice(request.tool_choice),
        response_format=_chat_format(request.text.format if request.text else None),
        # There is an event after the last token, as with the usage of a chat.
        stream_options=StreamOptions(include_usage=True) if request.stream else None,
        **{name: getattr(request, name) for name in _PASSED_ON},
    )


def repeated(request: ResponsesRequest) -> bytes:
    """Return the members of the answer that repeat the request, as a JSON object."""
    effort = request.reasoning.effort if request.reasoning else None
    text_format = request.text.format if request.text else None
    members = {
        "background": False,
        "completed_at": None,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": request.presence_penalty or 0.0,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": _repeated_format(text_format), "verbosity": "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": [
            {"type": "function"} | {name: tool.get(name) for name in _TOOL_MEMBERS} for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
    return msgspec.json.encode(members)


def renamed(error: ApiError) -> ApiError:
    """Return an error of the chat with the names that its fields have here."""
    field, dot, rest = (error.param or "").partition(".")
    if field in _NAMES:
        error.param = _NAMES[field] + ("" if field == "messages" else dot + rest)
    error.message = _NAMED.sub(lambda match: f"`{_NAMES[match[1]]}`", error.message)
    return error


def _wants_logprobs(request: ResponsesRequest) -> bool:
    for name in request.include or ():
        if name not in (LOGPROBS, *_WITHOUT_EFFECT):
            raise bad_request(f"`include` has `{name[:100]}`, which is not known here.", "include")
    wanted = LOGPROBS in (request.include or ())
    if request.top_logprobs and not wanted:
        raise bad_request(f"`top_logprobs` needs `{LOGPROBS}` in `include`.", "top_logprobs")
    if wanted and request.tools and request.tool_choice != "none":
        # The tokens of a call have no place in the answer.
        message = f"`{LOGPROBS}` in `include` cannot be combined with `tools`."
        raise bad_request(message, "include", "unsupported_parameter")
    return wanted


def _chat_tool(tool: dict[str, Any], i: int) -> dict[str, Any]:
    """Return a tool in the form of a chat: its members are in `function`."""
    where = f"tools[{i}]"
    if (kind := tool.get("type")) != "function":
        message = f"`{where}.type` is {str(kind)[:64]!r}. {_HOSTED} Leave this tool out."
        raise bad_request(message, "tools", "unsupported_parameter")
    if not isinstance(tool.get("name"), str):
        raise bad_request(f"`{where}` needs a `name`, a string.", "tools")
    members = {name: tool[name] for name in _TOOL_MEMBERS if tool.get(name) is not None}
    return {"type": "function", "function": members}


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
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


def _named(choice: dict[str, Any], where: str) -> dict[str, Any]:
    if (kind := choice.get("type")) != "function":
        message = f"`{where}.type` is {str(kind)[:64]!r}. {_HOSTED}"
        raise bad_request(message, "tool_choice", "unsupported_parameter")
    if not isinstance(choice.get("name"), str):
        raise bad_request(f"`{where}` needs a `name`, a string.", "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}


def _chat_format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None or given.type == "text":
        return None
    if given.type not in _FORMATS:
        raise bad_request(f"`text.format.type` must be one of {', '.join(_FORMATS)}.", "text.format.type")
    if given.type == "json_object":
        return ResponseFormat(type="json_object")
    if not bytes(given.schema).startswith(b"{"):
        raise bad_request("`text.format` needs a `schema`, an object.", "text.format.schema")
    schema = JsonSchemaFormat(
        name=given.name, description=given.description, schema=given.schema, strict=given.strict
    )
    return ResponseFormat(type="json_schema", json_schema=schema)


def _repeated_format(given: TextFormat | None) -> dict[str, Any]:
    if given is None or given.type != "json_schema":
        return {"type": given.type if given else "text"}
    members = {"name": given.name or "answer", "schema": given.schema, "strict": given.strict}
    return {"type": "json_schema", "description": given.description} | members
