"""From a Messages request to the chat that answers it. Pure."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from daemon.api.errors import ApiError, bad_request
from daemon.api.grammar.forms import JsonSchemaFormat, ResponseFormat
from daemon.api.messages.conversation import to_messages
from daemon.api.messages.schema import (
    CountTokensRequest,
    MessagesRequest,
    OutputFormat,
    Thinking,
    Thread,
    Tool,
    ToolChoice,
)
from daemon.api.schemas import ChatRequest, StreamOptions
from daemon.api.unsupported import refuse_unsupported

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "stream", "seed", "priority", "cache_salt")
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_CLEARS_THINKING = "clear_thinking_"  # a chat template decides anyway which earlier thinking a model sees
# Fields of a chat, by what they are called here.
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
_NAMED = re.compile(rf"`({'|'.join(_NAMES)})`")


def to_chat(request: CountTokensRequest, reads: Container[str]) -> ChatRequest:
    """Return the chat whose answer is that of the request; of one that only counts, with the same prompt.

    `reads`: the variables that the chat template reads. Raises ApiError (400) for what a chat cannot do.
    """
    refuse_unsupported(request)
    _check_context_management(request.context_management)
    _check_thread(request.thread)
    messages = to_messages(request.system, request.messages)
    # An answer that the client has begun goes on.
    begun = messages[-1].role == "assistant" and not messages[-1].tool_calls
    choice = request.tool_choice
    chat = ChatRequest(
        messages=messages,
        model=request.model,
        tools=[_chat_tool(tool, i) for i, tool in enumerate(request.tools or ())] or None,
        tool_choice=_chat_choice(choice) if choice is not None else None,
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=_chat_format(request),
        reasoning_effort=request.output_config.effort if request.output_config else None,
        continue_final_message=True if begun else None,
        add_generation_prompt=False if begun else None,
    )
    _apply_thinking(chat, request.thinking, reads)
    if isinstance(request, MessagesRequest):
        for name in _SAMPLING:
            setattr(chat, name, getattr(request, name))
        chat.stop = request.stop_sequences
        # There are events after the last token, as with the usage of a chat.
        chat.stream_options = StreamOptions(include_usage=True) if request.stream else None
    return chat


def renamed(error: ApiError) -> ApiError:
    """Return an error of the chat with the names that its fields have here."""
    error.message = _NAMED.sub(lambda match: f"`{_NAMES[match[1]]}`", error.message)
    error.param = _NAMES.get(error.param or "", error.param)
    return error


def _check_context_management(given: Any) -> None:
    edits = given.get("edits") if isinstance(given, dict) else None
    for edit in edits if isinstance(edits, list) else ():
        kind = str(edit.get("type")) if isinstance(edit, dict) else ""
        if not kind.startswith(_CLEARS_THINKING):
            message = f"The edit `{kind[:100]}` is not supported. Shorten the conversation yourself."
            raise bad_request(message, "context_management", "unsupported_parameter")


def _check_thread(thread: Thread | None) -> None:
    """Accept a new thread, of which nothing is kept. Its clients know what to do when it is not found later."""
    if thread is None or thread.type == "create":
        return
    if thread.type != "continue":
        raise bad_request("`thread.type` must be create or continue.", "thread")
    message = "This server keeps no conversations. Send the whole one in `messages`, as a new thread."
    raise ApiError(404, message, param="thread", code="thread_not_found")


def _chat_tool(tool: Tool, i: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        message = f"Tools of type `{tool.type[:100]}` are not supported here; only those of type custom are."
        raise bad_request(message, f"tools.{i}", "unsupported_parameter")
    if tool.input_schema is None:
        raise bad_request("A tool needs an `input_schema`.", f"tools.{i}")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    given = {"strict": tool.strict} | function
    return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


def _chat_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        if not choice.name:
            raise bad_request("A `tool_choice` of type tool needs a `name`.", "tool_choice")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _CHOICES:
        raise bad_request(f"`tool_choice.type` must be one of {', '.join(_CHOICES)} and tool.", "tool_choice")
    return _CHOICES[choice.type]


def _chat_format(request: CountTokensRequest) -> ResponseFormat | None:
    given: OutputFormat | None = request.output_config.format if request.output_config else None
    given = given or request.output_format
    if given is None:
        return None
    if given.type != "json_schema" or not bytes(given.schema):
        raise bad_request("`format` must have the type json_schema and a `schema`.", "output_config.format")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=given.schema, strict=True))


def _apply_thinking(chat: ChatRequest, thinking: Thinking | None, reads: Container[str]) -> None:
    """Tell the chat template whether to think. Without `thinking` the template decides."""
    if thinking is None:
        return
    if thinking.type not in _THINKING:
        raise bad_request(f"`thinking.type` must be one of {', '.join(_THINKING)}.", "thinking")
    if thinking.type in ("enabled", "disabled") and "enable_thinking" in reads:
        chat.chat_template_kwargs = {"enable_thinking": thinking.type == "enabled"}
    if thinking.type == "disabled" or thinking.display == "omitted":
        chat.include_reasoning = False
