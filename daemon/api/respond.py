"""Answers one checked request for a completion, from its admission to the last byte.

A request may end early: the client hangs up, the deadline passes or its engine is lost. Leaving the contexts then
frees the places in the queue, the streams and their blocks. The releases do not await, so nothing interrupts them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from daemon.api.access_log import USAGE
from daemon.api.auth import client_name, current_key
from daemon.api.body_memory import HeldBody
from daemon.api.errors import ApiError, deadline_exceeded, to_api_error
from daemon.api.generator import Admitted, RequestAttributes
from daemon.api.grammar.reasoning import after_reasoning
from daemon.api.grammar.requested import RequestedGrammar, forget_forms
from daemon.api.outbox_writer import OutboxWriter
from daemon.api.params import (
    bad_word_tokens,
    constrained,
    default_max_tokens,
    prefix_salt,
    requested_max_tokens,
    sampling_params,
)
from daemon.api.parse.formats import Parsing
from daemon.api.parse.parts import Part
from daemon.api.render.answer import Answer, Prompt
from daemon.api.render.apis import Api, renderer_of
from daemon.api.render.renderer import EventWriter, Renderer
from daemon.api.request_id import ANSWER_ID, kept_id, request_id, sent_request_id
from daemon.api.request_identity import Identity
from daemon.api.response_facts import PromptFacts, ResponseFacts, answer_form
from daemon.api.response_head import EVENT_HEADERS, JSON_HEADERS, STREAM_HEADER, response_headers
from daemon.api.schemas import ChatRequest, CompletionRequest
from daemon.api.service import Service
from daemon.api.sse import EventStream
from daemon.api.stream_group import StreamGroup, first_by
from daemon.api.validation import KEEP_HEADER, check_length, priority_class, wants_keep
from daemon.ipc.messages import SamplingParams
from daemon.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from daemon.api.kept_streams import KeptStream

_WORK_OF_SUBMISSION = 2000  # in tokens that are written to the journal in the same time
_MAX_WORK = 200_000  # tokens; they take a few milliseconds


class CheckedRequest:
    """A checked request for a completion, with its id and arrival time.

    `tokenise` returns its `num_prompts` prompts. `held` is the memory of its body. `client`: the one that it counts
    for in admission. Key and body together decide its `priority` and `cache_salt`, the salt of its prefix blocks.
    `api`, `parsing` and `extra` say how its answer is written: see `AnswerForm`. `grammar` constrains it.
    """

    def __init__(
        self,
        http: web.Request,
        body: ChatRequest | CompletionRequest,
        *,
        api: Api,
        num_prompts: int,
        held: HeldBody,
        tokenise: Callable[[], list[Prompt]],
        parsing: Parsing | None = None,
        grammar: RequestedGrammar | None = None,
        extra: bytes = b"",
    ) -> None:
        key = current_key.get()
        self.body = body
        self.api = api
        self.parsing = parsing
        self.extra = extra
        self.client = client_name(key, http.remote)
        self.priority = (
            priority_class(body.priority, key.priority, key.max_priority) if key else priority_class(body.priority)
        )
        self.cache_salt = prefix_salt(key.tenant if key else "", body.cache_salt)
        self.num_prompts = num_prompts
        self._held = held
        self._tokenise = tokenise
        self._requested_grammar = grammar
        self._grammar = ""  # in the engines' form, once it is compiled
        self.id = api.id_prefix + secrets.token_hex(16)
        self.x_request_id = ""  # that the client has sent
        self.keep = False  # it goes on after a hang-up, and can be read again
        self.identity: Identity | None = None  # of the requests that get the same answer
        self.bad_words: tuple[tuple[int, ...], ...] = ()  # in tokens; known once it is tokenised
        self.arrival = time.monotonic()

    def attributes(self, label: str) -> RequestAttributes:
        """Return the attributes of one of its choices."""
        return RequestAttributes(label, self.priority, self.cache_salt, self.client, self.x_request_id)

    async def compile_grammar(self, service: Service, prompts: list[Prompt]) -> None:
        """Compile the grammar, if there is one. Raises ApiError (400) if that is not possible."""
        if self._requested_grammar is None:
            return
        source, param = self._requested_grammar
        if self.parsing is not None and self.parsing.reasoning:
            source = after_reasoning(source, service.tokenizer.marker_id, open=prompts[0].thinking)
        self._grammar = await service.grammars.compile(source, param)
        self._requested_grammar = None
        forget_forms(self.body)

    def sampling(self, service: Service, max_tokens: int, seed: int, choice: int) -> SamplingParams:
        """Return the sampling parameters of a choice. Call `compile_grammar` and `tokenise` before."""
        params = sampling_params(self.body, max_tokens, seed, choice, self.bad_words)
        return constrained(params, self._grammar, service.model_config.eos_token_ids)

    async def tokenise(self, service: Service) -> list[Prompt]:
        """Return the prompts, and forget their text: an answer may take long, and does not need it."""
        prompts, self.bad_words = await service.off_loop(lambda: self._tokenised(service.tokenizer), self._held.size)
        self.drop()
        return prompts

    def drop(self) -> None:
        """Forget the text of the prompts."""
        if isinstance(self.body, ChatRequest):
            self.body.messages = []
        else:
            self.body.prompt = ""
        self._held.release()

    def _tokenised(self, tokenizer: Tokenizer) -> tuple[list[Prompt], tuple[tuple[int, ...], ...]]:
        return self._tokenise(), bad_word_tokens(self.body.bad_words, lambda text: tokenizer.encode(text, False))


async def respond(service: Service, http: web.Request, request: CheckedRequest) -> web.StreamResponse:
    """Answer the request, as a stream or as a whole.

    Raises ApiError and the generator's errors as long as no byte is sent. A later error is the last event of the
    stream.
    """
    header, most = http.headers.get(KEEP_HEADER), service.config.keep_streams
    if wants_keep(header, request.body, request.num_prompts, most, once=request.identity is not None):
        request.keep, request.id = True, kept_id(request.id, service.frontend)
    service.page.observe("request_params_n", request.body.n or 1)
    http[ANSWER_ID], request.x_request_id = request.id, sent_request_id(http)
    writer = OutboxWriter(http.protocol, service.page)
    http._payload_writer = writer
    try:
        return await (_stream if request.body.stream else _whole)(service, http, request, writer)
    finally:
        writer.unguard()


async def _whole(
    service: Service, http: web.Request, request: CheckedRequest, writer: OutboxWriter
) -> web.StreamResponse:
    response = web.Response(headers=JSON_HEADERS | _kept_header(request))
    async with _submitted(service, http, request, writer) as (answer, streams):
        if not request.keep:
            response.body = await whole_body(renderer_of(answer), answer, streams)
            await answer.leave_deadline()
            await _send(response, http)  # here: the journal has the answer until the context is left
            return response
        facts = _facts(service, http, request, answer, streams, writer)
        kept = service.kept.add(facts, streams.detach(), answer.detach())
    try:
        response.body = await service.kept.whole(kept, writer.abort)
    finally:
        http[USAGE] = kept.num_tokens()
    await _send(response, http)
    return response


async def _send(response: web.Response, http: web.Request) -> None:
    try:
        await response.prepare(http)
        await response.write_eof()
    except ConnectionError:
        pass  # the client has hung up


async def _stream(
    service: Service, http: web.Request, request: CheckedRequest, writer: OutboxWriter
) -> web.StreamResponse:
    response = web.StreamResponse(headers=EVENT_HEADERS | _kept_header(request))
    api = request.api
    events = EventStream(writer, service.config.heartbeat, lambda: response.prepare(http), ping=api.ping)
    kept: KeptStream | None = None
    renderer: Renderer | None = None
    async with events:
        try:
            async with _submitted(service, http, request, writer) as (answer, streams):
                if request.keep:
                    facts = _facts(service, http, request, answer, streams, writer)
                    kept = service.kept.add(facts, streams.detach(), answer.detach())
                else:
                    renderer = renderer_of(answer)
                    await write_events(renderer, answer, streams, events)
            if kept is not None:
                await service.kept.read(kept, events, kept.point_after(""), writer.abort)
        except ConnectionError:
            pass  # the client has hung up
        except Exception as e:
            if not events.started:
                raise
            await events.fail((renderer or api.renderer.errors).event(to_api_error(e)))
        finally:
            if kept is not None:
                http[USAGE] = kept.num_tokens()
    return response


def _kept_header(request: CheckedRequest) -> dict[str, str]:
    return {STREAM_HEADER: request.id} if request.keep else {}


@asynccontextmanager
async def _submitted(
    service: Service, http: web.Request, request: CheckedRequest, writer: OutboxWriter
) -> AsyncIterator[tuple[Answer, StreamGroup]]:
    """Submit all choices of the request; leaving the context cancels those that have not ended.

    Raises the errors of admission and submission, and ApiError (504) if the body runs past the request's deadline.
    """
    seconds = service.config.request_deadline
    try:
        async with asyncio.timeout(seconds if seconds > 0 else None) as deadline:
            with StreamGroup(deadline, first_by=first_by(service.config, request.arrival)) as streams:
                # Take the places before any work: under a burst, tokenise no request that is then refused.
                count = request.num_prompts * (request.body.n or 1)
                with service.generator.admit(count, client=request.client, priority=request.priority) as places:
                    prompts = await request.tokenise(service)
                    await request.compile_grammar(service, prompts)
                    form = answer_form(
                        request.body, service.model_config,
                        api=request.api.name, parsing=request.parsing, extra=request.extra,
                    )  # fmt: skip
                    facts = [PromptFacts(len(prompt.tokens), prompt.echo, prompt.thinking) for prompt in prompts]
                    answer = Answer(service, form, facts, request.id, int(time.time()), request.arrival, deadline)
                    await _submit(service, request, places, prompts, answer, streams)
                if service.guard is not None:
                    await service.guard.open(
                        http.protocol, writer, _facts(service, http, request, answer, streams, writer)
                    )
                try:
                    with answer:
                        yield answer, streams
                finally:
                    http[USAGE] = answer.num_tokens()
    except TimeoutError:
        raise deadline_exceeded(seconds) from None


def _facts(
    service: Service,
    http: web.Request,
    request: CheckedRequest,
    answer: Answer,
    streams: StreamGroup,
    writer: OutboxWriter,
) -> ResponseFacts:
    return ResponseFacts(
        id=answer.id,
        created=answer.created,
        arrival=answer.arrival,
        form=answer.form,
        prompts=answer.prompts,
        slots=[stream.slot for stream in streams],
        rids=[stream.rid for stream in streams],
        minor=http.version.minor,
        head_sent=writer.output_size > 0,
        headers=response_headers(http, service.origins) | _kept_header(request),
        client=http.remote or "",
        method=http.method,
        path=http.rel_url.raw_path,
        request_id=request_id(http),
        keep=request.keep,
        owner=request.client,
        identity=request.identity,
    )


async def _submit(
    service: Service,
    request: CheckedRequest,
    places: Admitted,
    prompts: list[Prompt],
    answer: Answer,
    streams: StreamGroup,
) -> None:
    """Start every choice of every prompt. Let the event loop run in between if there are many or long ones."""
    body, limits = request.body, service.limits
    requested, max_model_len = requested_max_tokens(body), service.max_model_len
    param = request.api.param
    for prompt in prompts:
        least = None if request.api.shrinks else requested if requested is not None else body.min_tokens or None
        check_length(len(prompt.tokens), least, max_model_len, limits, param)
        service.check_embedded(prompt.tokens, param)
    most = default_max_tokens(body, limits.max_output_tokens) if requested is None else requested
    outputs = [min(most, max_model_len - len(prompt.tokens)) for prompt in prompts]
    _check_room(service, request, prompts, outputs, answer.id)
    work = 0
    for prompt, max_tokens in zip(prompts, outputs, strict=True):
        # If the request sets no seed, each prompt gets its own, so equal prompts get different answers.
        seed = secrets.randbits(64) if body.seed is None else body.seed
        for i in range(body.n or 1):
            work += _WORK_OF_SUBMISSION + len(prompt.tokens)
            if work > _MAX_WORK:
                work = 0
                await asyncio.sleep(0)
            params = request.sampling(service, max_tokens, seed, i)
            label = f"{answer.id}-{len(answer.choices)}"
            stream = service.generator.submit(prompt.tokens, params, request.attributes(label))
            streams.add(stream)
            places.submitted()
            answer.add(stream, max_tokens)


def _check_room(
    service: Service, request: CheckedRequest, prompts: list[Prompt], outputs: list[int], id: str
) -> None:
    """Raise TooMany if the choices can never run together, before the first of them is started.

    `outputs`: the largest number of output tokens of each prompt's choices.
    """
    n = request.body.n or 1
    lengths = [(len(prompt.tokens), most) for prompt, most in zip(prompts, outputs, strict=True) for _ in range(n)]
    if len(lengths) > 1:
        params = request.sampling(service, outputs[0], 0, 0)
        service.generator.check_room(lengths, params, request.attributes(f"{id}-0"))


async def whole_body(renderer: Renderer, answer: Answer, streams: StreamGroup) -> bytes:
    """Wait for the end of all choices and return the body of the response."""
    parts: list[list[Part]] = [[] for _ in answer.choices]
    while answer.unfinished:
        for i, chunk in await streams.next():
            if answer.describes_prompt:
                await answer.describe_prompt(i, chunk)
            parts[i] += answer.push(i, chunk)
            if answer.choices[i].finish:
                streams.stop(i)
    return msgspec.json.encode(renderer.whole(parts))


async def write_events(writer: EventWriter, answer: Answer, streams: StreamGroup, events: EventStream) -> None:
    """Send the events of the answer as its tokens arrive, and close the stream."""
    out: list[bytes] = []
    while answer.unfinished:
        if out:
            await events.send(b"".join(out), writer.state)
            out = []
        try:
            for i, chunk in await streams.next():
                if answer.describes_prompt:
                    await answer.describe_prompt(i, chunk)
                writer.begin(i, out)
                writer.write(i, answer.push(i, chunk), out)
                if answer.choices[i].finish:
                    streams.stop(i)
        except ApiError:
            if out:  # of other choices
                await events.send(b"".join(out), writer.state)
            raise
    writer.end(out)
    out.append(writer.closing)
    await events.close(b"".join(out))
