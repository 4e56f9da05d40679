"""The life of one request for an answer, from its checked body to its last byte.

Whatever ends it early (the client hangs up, the deadline, a lost engine), leaving the contexts frees the
places in the queue, the streams and their blocks; nothing of that waits, so nothing of it can be interrupted.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from daemon.api.answer import Answer, AnswerWriter, Prompt, Request
from daemon.api.auth import current_key
from daemon.api.errors import deadline_exceeded
from daemon.api.params import asked_max_tokens, default_max_tokens, sampling_params
from daemon.api.schemas import ChatRequest
from daemon.api.service import Service, explain
from daemon.api.sse import EventStream
from daemon.api.stream_group import StreamGroup
from daemon.api.validation import check_length, priority_class

Deliver = Callable[[Answer, StreamGroup], Awaitable[web.StreamResponse]]


class Task:
    """A checked request: how many prompts it has, and how to make tokens of them (`size` characters)."""

    def __init__(self, request: Request, count: int, size: int, tokenise: Callable[[], list[Prompt]]) -> None:
        key = current_key.get()
        self.request = request
        self.priority = priority_class(request.priority, key.priority if key else 0)
        self.count = count
        self.size = size
        self.tokenise = tokenise
        self.id = ("chatcmpl-" if isinstance(request, ChatRequest) else "cmpl-") + secrets.token_hex(16)
        self.arrival = time.monotonic()


async def respond(service: Service, http: web.Request, task: Task) -> web.StreamResponse:
    """The answer, streamed or whole. Raises ApiError and the generator's errors while nothing was sent."""
    service.page.observe("request_params_n", task.request.n or 1)
    if not task.request.stream:
        return await _run(service, task, _whole)
    events = EventStream(http, service.config.heartbeat)
    async with events:
        try:
            return await _run(service, task, lambda answer, fan: _stream(task, events, answer, fan))
        except ConnectionError:
            return events.response  # the client is gone
        except Exception as e:
            if not events.started:
                raise
            await events.fail(explain(e))
            return events.response


async def _run(service: Service, task: Task, deliver: Deliver) -> web.StreamResponse:
    seconds = service.config.request_deadline
    try:
        async with asyncio.timeout(seconds if seconds > 0 else None):
            with StreamGroup() as fan:
                answer = await _start(service, task, fan)
                with answer:
                    return await deliver(answer, fan)
    except TimeoutError:
        raise deadline_exceeded(seconds) from None


async def _start(service: Service, task: Task, fan: StreamGroup) -> Answer:
    """Every choice submitted. Raises what admission and submission raise."""
    # Places are taken before any work is done: a burst must not be tokenised to be turned away.
    with service.generator.admit(task.count * (task.request.n or 1)):
        prompts = await service.off_loop(task.tokenise, task.size)
        answer = Answer(service, task.request, prompts, task.id, task.arrival)
        _submit(service, task, prompts, answer, fan)
        return answer


def _submit(service: Service, task: Task, prompts: list[Prompt], answer: Answer, fan: StreamGroup) -> None:
    """Start every choice of every prompt."""
    request, priority = task.request, task.priority
    asked, longest = asked_max_tokens(request), service.max_model_len
    param = "messages" if answer.chat else "prompt"
    for prompt in prompts:
        check_length(len(prompt.tokens), asked, longest, service.limits, param)
    salt = (request.cache_salt or "").encode()
    for prompt in prompts:
        room = longest - len(prompt.tokens)
        max_tokens = asked or min(default_max_tokens(request, service.limits.max_output_tokens), room)
        # Without a seed of the client's, equal prompts in one request get answers of their own.
        seed = secrets.randbits(64) if request.seed is None else request.seed
        for i in range(request.n or 1):
            params = sampling_params(request, max_tokens, seed, i)
            label = f"{answer.id}-{len(answer.choices)}"
            fan.add(service.generator.submit(prompt.tokens, params, label=label, priority=priority, cache_salt=salt))
            answer.add(params)


async def _whole(answer: Answer, fan: StreamGroup) -> web.StreamResponse:
    texts: list[list[str]] = [[] for _ in answer.choices]
    while answer.unfinished:
        for i, piece in await fan.next():
            texts[i].append(answer.push(i, piece))
            if answer.choices[i].finish:
                fan.stop(i)
    body = msgspec.json.encode(answer.whole(["".join(t) for t in texts]))
    return web.Response(body=body, content_type="application/json")


async def _stream(task: Task, events: EventStream, answer: Answer, fan: StreamGroup) -> web.StreamResponse:
    options = task.request.stream_options
    include_usage = options is not None and bool(options.include_usage)
    continuous = include_usage and options is not None and bool(options.continuous_usage_stats)
    writer = AnswerWriter(answer, include_usage=include_usage, continuous=continuous)
    while answer.unfinished:
        out: list[bytes] = []
        for i, piece in await fan.next():
            writer.write(i, answer.push(i, piece), out)
            if answer.choices[i].finish:
                fan.stop(i)
        if not answer.unfinished:
            writer.end(out)
        if out:
            await events.send(b"".join(out))
    await events.close()
    return events.response
