"""From a Responses request to the chat that answers it, and to what the answer repeats of it. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from daemon.api.errors import ApiError, bad_request
from daemon.api.grammar.forms import JsonSchemaFormat, ResponseFormat
from daemon.api.render.responses import ResponseExtra
from daemon.api.responses.conversation import to_messages
from daemon.api.responses.schema import ResponsesRequest, TextFormat
from daemon.api.responses.tools import chat_choice, chat_tools, names_in_namespaces, repeated_tools
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
_FORMATS = ("text", "json_object", "json_schema")
# Fields of a chat, by what they are called here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_WRAPPED = re.compile(r"`(tools\[\d+\]|tool_choice)\.(?:function|allowed_tools)(?=[.`])")  # here without that object
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
        tools=chat_tools(request.tools or ()) or None,
        tool_choice=chat_choice(request.tool_choice),
        response_format=_chat_format(request.text.format if request.text else None),
        # There is an event after the last token, as with the usage of a chat.
        stream_options=StreamOptions(include_usage=True) if request.stream else None,
        **{name: getattr(request, name) for name in _PASSED_ON},
    )


def extra(request: ResponsesRequest) -> bytes:
    """Return what the renderer must know of a checked request: an encoded `ResponseExtra`."""
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
        "tools": repeated_tools(request.tools or ()),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
    return msgspec.json.encode(ResponseExtra(members, names_in_namespaces(request.tools or ())))


def renamed(error: ApiError) -> ApiError:
    """Return an error of the chat with the names that its fields have here."""
    field, dot, rest = (error.param or "").partition(".")
    if field in _NAMES:
        error.param = _NAMES[field] + ("" if field == "messages" else dot + rest)
    message = _NAMED.sub(lambda match: f"`{_NAMES[match[1]]}`", error.message)
    error.message = _WRAPPED.sub(r"`\1", message)
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
