"""From a chat to its prompt and to the parts of its answer, in whatever API it came."""

from __future__ import annotations

from typing import Any, NamedTuple

from aiohttp import web
from msgspec.structs import replace

from daemon.api import validation
from daemon.api.body_memory import HeldBody
from daemon.api.chat_messages import parts_of
from daemon.api.errors import bad_request
from daemon.api.grammar.requested import RequestedGrammar, check_combination, requested_grammar
from daemon.api.grammar.tools import calls_rules
from daemon.api.idempotency import respond_once
from daemon.api.parse import reasoning
from daemon.api.parse.formats import Parsing
from daemon.api.prompt_encoder import PromptEncoder
from daemon.api.render.answer import Prompt
from daemon.api.render.apis import CHAT, Api
from daemon.api.respond import CheckedRequest
from daemon.api.schemas import ChatRequest, Message
from daemon.api.service import Service
from daemon.api.tools import ToolUse, tool_use
from daemon.models.grammar.source import GrammarKind, GrammarSource


class Chat(NamedTuple):
    """A checked chat. `variables`: for the chat template. `parsing`: None if all of its answer is text.

    `grammar`: what its answer must match, except for its reasoning; None if that is free.
    """

    body: ChatRequest
    variables: dict[str, Any]
    tools: ToolUse | None
    parsing: Parsing | None
    grammar: RequestedGrammar | None


def check_chat(service: Service, body: ChatRequest, model: str | None = None) -> Chat:
    """Check a decoded chat. `model`: that its path names. Raises ApiError (400, 404)."""
    service.check_model(model or body.model)
    validation.check_chat(body, service.limits)
    tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if tools is not None:
        check_tool_format(service, tools)
    grammar = _grammar(service, body, tools)
    return Chat(body, service.template_variables(body), tools, _parsing(service, body, tools), grammar)


def check_tool_format(service: Service, tools: ToolUse) -> None:
    """Raise ApiError (400) if this server cannot read the calls of its model."""
    if not service.tool_format:
        why = "This server's option tool_format is none."
        if service.config.tool_format != "none":
            why = (
                "This server does not read the form of tool calls in its chat template. "
                "The operator can set tool_format, if the model knows another form."
            )
        raise bad_request(f"Tools are not supported for this model. {why}", "tools", "unsupported_parameter")


def _grammar(service: Service, body: ChatRequest, tools: ToolUse | None) -> RequestedGrammar | None:
    """Return what the answer must match: tool calls, the form that the request asks for, or either of them."""
    asked = requested_grammar(body)
    if tools is None or not (tools.must or asked):
        return asked
    if tools.must:
        check_combination(body, "tool_choice")
        asked = RequestedGrammar(GrammarSource(GrammarKind.NONE), "tools")
    assert asked is not None
    calls = calls_rules(
        tools.tools,
        tools.names,
        service.tool_format,
        parallel=tools.parallel and not tools.named,
        token_id=service.tokenizer.marker_id,
    )
    return asked._replace(source=replace(asked.source, calls=calls))


def _parsing(service: Service, body: ChatRequest, tools: ToolUse | None) -> Parsing | None:
    if tools is None and not service.reasoning_format:
        return None
    return Parsing(
        tool_format=service.tool_format if tools is not None else "",
        tools=tools.names if tools is not None else (),
        parallel=tools is None or tools.parallel,
        forced=tools is not None and tools.named,
        reasoning=service.reasoning_format,
        show_reasoning=body.include_reasoning is not False,
    )


def chat_prompt(service: Service, chat: Chat, param: str) -> Prompt:
    """Return the prompt of a checked chat. `param`: the field that it comes from. Raises ApiError (400)."""
    body, tools = chat.body, chat.tools.tools if chat.tools is not None else None
    begins, goes_on = body.add_generation_prompt is not False, bool(body.continue_final_message)
    text = service.render(body.messages, begins, chat.variables, tools, open_end=goes_on)
    # The template has written the special tokens, so the default is to add none.
    tokens = PromptEncoder.of(service, body, param).encode(text, bool(body.add_special_tokens))
    last = _last_answer(body.messages) if body.echo or goes_on else ""
    thinking = reasoning.is_open(last) if goes_on else begins and text.rstrip().endswith(reasoning.BEGIN)
    return Prompt(tokens, last if body.echo else "", thinking)


async def answer_chat(
    service: Service, http: web.Request, held: HeldBody, chat: Chat, *, api: Api = CHAT, extra: bytes = b""
) -> web.StreamResponse:
    """Answer a checked chat. `extra`: for the renderer of `api`."""

    def tokenise() -> list[Prompt]:
        prompt = chat_prompt(service, chat, api.param)
        if chat.tools is not None:
            chat.tools.tools.clear()  # an answer may take long, and does not need them
        return [prompt]

    request = CheckedRequest(
        http,
        chat.body,
        api=api,
        num_prompts=1,
        held=held,
        tokenise=tokenise,
        parsing=chat.parsing,
        grammar=chat.grammar,
        extra=extra,
    )
    return await respond_once(service, http, request)


def _last_answer(messages: list[Message]) -> str:
    """Return what a chat's `echo` repeats: the last message, if it is the assistant's."""
    message = messages[-1]
    if message.role != "assistant":
        return ""
    return "\n".join(parts_of(message))
