"""The objects that all handlers share, and helpers from text to tokens and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from daemon.api.body_memory import BodyMemory, HeldBody, trim_memory
from daemon.api.chat_messages import for_template, track_messages
from daemon.api.errors import bad_request, model_not_found
from daemon.api.generator import Generator
from daemon.api.grammar.compiler import GrammarCompiler
from daemon.api.metrics import FrontendMetrics
from daemon.api.origins import OriginPolicy
from daemon.api.parse.formats import AUTO, NONE, detect_reasoning, detect_tool_format
from daemon.api.request_body import check_media_type
from daemon.api.request_identity import BODY_DIGEST, KEY_HEADER, body_digest
from daemon.api.response_guard import ResponseGuard
from daemon.api.routes.spellings import DEPLOYMENT
from daemon.api.schemas import ChatRequest, Message, TokenizeRequest
from daemon.api.tools import describe
from daemon.api.validation import Limits
from daemon.config import Config
from daemon.models.chat_template import ChatError, ChatTemplate
from daemon.models.conversation import render_any, render_open
from daemon.models.model_config import ModelConfig
from daemon.models.tokenizer import Tokenizer
from daemon.models.tracked_text import track

if TYPE_CHECKING:
    from daemon.api.kept_streams import KeptStreams
    from daemon.api.other_frontends import OtherFrontends

T = TypeVar("T")

PARSE_ON_LOOP = 16 << 10  # bytes of a body; a thread decodes and checks a larger one
TOKENISE_ON_LOOP = 4096  # characters; a thread tokenises longer text
_LARGE = 256 << 10  # bytes or characters from which on work waits only for other large work


class Service:
    """State that the routes of one frontend share."""

    def __init__(
        self,
        *,
        config: Config,
        generator: Generator,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        model_config: ModelConfig,
        metrics: FrontendMetrics,
        origins: OriginPolicy,
        guard: ResponseGuard | None,
        others: OtherFrontends | None = None,
        frontend: int = 0,
    ) -> None:
        """`guard`: makes responses outlive this process; None: they do not.

        `others`: the other frontends; None: there are none. `frontend`: index of this one.
        """
        self.config = config
        self.generator = generator
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.model_config = model_config
        self.model_names = config.served_name or [model_config.name]
        self._known_names = {*self.model_names, config.model}
        self.metrics = metrics
        self.page = metrics.page
        self.origins = origins
        self.guard = guard
        self.others = others
        self.frontend = frontend
        self.kept: KeptStreams  # it needs this object, so it is set later
        self.limits = Limits(
            vocab_size=model_config.vocab_size,
            max_choices=min(config.max_choices, config.max_queued),
            max_queued=config.max_queued,
            max_prompt_tokens=config.max_prompt_tokens,
            max_output_tokens=min(config.max_output_tokens, config.max_requested_tokens or config.max_output_tokens),
            max_requested_tokens=config.max_requested_tokens,
            max_messages=config.max_messages,
            max_stops=config.max_stops,
            max_logit_bias=config.max_logit_bias,
            max_logprobs=config.max_logprobs,
            max_tools=config.max_tools,
        )
        # The forms in which the model writes tool calls and reasoning; "": none that is read.
        source = chat_template.source
        self.tool_format = _format(config.tool_format, source, detect_tool_format)
        self.reasoning_format = _format(config.reasoning_format, source, detect_reasoning)
        # Only two threads: more would take the processors from the event loop.
        self._small = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-text")
        self.grammars = GrammarCompiler(config, model_config)
        self.bodies = BodyMemory(max(config.body_memory, config.max_body), metrics.page, trim_memory)

    def close(self) -> None:
        for threads in (self._small, self._large):
            threads.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, tokens; the configured or the model's until an engine reports its own."""
        configured = self.config.max_model_len or self.model_config.max_position
        return self.generator.max_model_len or configured

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a name that the served model does not have. None selects the served model."""
        if name is not None and name not in self._known_names:
            raise model_not_found(name[:200], self.model_names)

    @property
    def max_prompt_len(self) -> int:
        """Largest number of tokens in a prompt that leaves room for one token of output."""
        longest = self.max_model_len - 1
        return min(longest, self.config.max_prompt_tokens or longest)

    def check_embedded(self, tokens: list[int], param: str) -> None:
        """Raise ApiError (400) for a token that the tokenizer has, and for which the model has no embedding."""
        size = self.model_config.vocab_size
        if self.tokenizer.vocab_size > size and (largest := max(tokens, default=0)) >= size:
            text = self.tokenizer.token_text(largest)
            message = f"`{param}` has the token {text!r} (id {largest}), which this model cannot compute; remove it."
            raise bad_request(message, param)

    async def read(self, http: web.Request, held: HeldBody, parse: Callable[[bytes, str | None], T]) -> T:
        """Read the body of a request and return `parse` of it and of the model that the path names, or None.

        Raises ApiError, and the errors of `parse`.
        """
        check_media_type(http)
        body = await held.read(http, self.config.max_body)
        if KEY_HEADER in http.headers:
            path = http.match_info.route.resource
            digest = partial(body_digest, path.canonical if path is not None else "", body)
            http[BODY_DIGEST] = await self.off_loop(digest, len(body), PARSE_ON_LOOP)
        work = partial(parse, body, http.match_info.get(DEPLOYMENT))
        return await self.off_loop(work, len(body), PARSE_ON_LOOP)

    async def off_loop(self, work: Callable[[], T], size: int, at_once: int = TOKENISE_ON_LOOP) -> T:
        """Run `work` on the event loop, or in a thread if its `size` is more than `at_once` characters or bytes.

        If it is cancelled before its thread begins, it frees `work` at once.
        """
        if size <= at_once:
            return work()
        threads = self._large if size > _LARGE else self._small
        # A cancelled call stays in the executor's queue until its turn comes, so the queue must not hold the body.
        slot = [work]

        def run() -> T:
            return slot.pop()()  # raises into a cancelled future if the slot is empty

        try:
            return await asyncio.get_running_loop().run_in_executor(threads, run)
        finally:
            slot.clear()

    def template_variables(self, request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
        """Return what the request tells the chat template besides its messages.

        Variables that the template does not read have no effect: clients send one set of them to all their models.
        Raises ApiError (400) for those that only the server sets, unless they are false or null.
        """
        reads = self.chat_template.variables
        for name, value in (request.chat_template_kwargs or {}).items():
            if name in self.chat_template.own_variables and value not in (None, False):
                message = f"`chat_template_kwargs` has `{name}`, which this server sets itself. Send it as a field."
                raise bad_request(message, "chat_template_kwargs", "unsupported_parameter")
        given = {name: value for name, value in (request.chat_template_kwargs or {}).items() if name in reads}
        effort = request.reasoning_effort
        if effort is None:
            return given
        thinking = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return {name: value for name, value in thinking.items() if name in reads} | given

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        variables: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
        *,
        open_end: bool = False,
    ) -> str:
        """Return the prompt of a conversation. Raises ApiError (400) if the template refuses it.

        `tools`: for the template; if it takes none, the system message describes them. `open_end`: the prompt ends
        with the text of the last message, so that the model continues it.
        """
        template, change = self.chat_template, None
        if tools and template.takes_tools:
            variables = variables | {"tools": tools}
        elif tools:
            change = partial(describe, tools=tools, tool_format=self.tool_format)
        try:
            given = for_template(messages, template.forms, change)
            if self.config.sanitize_control_tokens:
                given, variables = track_messages(given), {name: track(v) for name, v in variables.items()}

            def render(messages: list[dict[str, Any]]) -> str:
                return template.render(messages, add_generation_prompt and not open_end, **variables)

            whole = partial(render_any, render)
            return render_open(whole, given) if open_end else whole(given)
        except ChatError as e:
            raise bad_request(str(e), "messages") from None
        except RecursionError:
            raise bad_request("The messages are nested too deeply.", "messages") from None

    def spell(self, tokens: list[int]) -> str:
        """Return the text of `tokens`, with special tokens as text."""
        if self.tokenizer.special_ids.isdisjoint(tokens):
            return self.tokenizer.decode(tokens)
        return b"".join(map(self.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")


def _format(option: str, source: str, detect: Callable[[str], str]) -> str:
    return "" if option == NONE else detect(source) if option == AUTO else option
