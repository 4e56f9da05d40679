"""Goes on with an answer from any state that it has been in: the journal has its output from the first token on."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from daemon.api.errors import deadline_exceeded
from daemon.api.generator import TokenStream
from daemon.api.render.answer import Answer
from daemon.api.render.apis import renderer_of
from daemon.api.render.renderer import Renderer
from daemon.api.request_metrics import RequestMetrics
from daemon.api.response_facts import ResponseFacts, choice_position
from daemon.api.service import Service
from daemon.api.stream_group import StreamGroup, first_by


@asynccontextmanager
async def resumed(
    service: Service,
    facts: ResponseFacts,
    requests: Sequence[TokenStream],
    state: Sequence[int],
    kept: Sequence[RequestMetrics] | None = None,
) -> AsyncIterator[tuple[Answer, Renderer, StreamGroup]]:
    """Bring a new answer of `requests` and its renderer to `state`, which its reader has. Leaving the context ends
    the answer.

    `kept`: the metrics of a stream that is kept: its requests go on if the context is left because the reader has
    hung up, and are never released. Raises ApiError if the deadline of the request passes.
    """
    try:
        async with asyncio.timeout(_time_left(service, facts, requests)) as deadline:
            waits = not any(request.accepted or request.done for request in requests)
            first = first_by(service.config, facts.arrival) if waits else math.inf
            with StreamGroup(deadline, kept=kept is not None, first_by=first) as streams:
                for request in requests:
                    streams.add(request)
                answer = Answer(
                    service, facts.form, facts.prompts, facts.id, facts.created, facts.arrival, deadline,
                    kept=kept is not None,
                )  # fmt: skip
                written = []
                for i, request in enumerate(requests):
                    sent = choice_position(state[1 + i])
                    written.append(await answer.resume(request, sent, kept[i] if kept is not None else None))
                    if answer.choices[i].finish:
                        streams.stop(i)
                renderer = renderer_of(answer)
                for i, parts in enumerate(written):
                    if choice_position(state[1 + i]).begun:
                        renderer.replay(i, parts)
                renderer.state[:] = state
                with answer:
                    yield answer, renderer, streams
    except TimeoutError:
        if not deadline.expired():
            raise
        raise deadline_exceeded(service.config.request_deadline) from None


def _time_left(service: Service, facts: ResponseFacts, requests: Sequence[TokenStream]) -> float | None:
    """Return the seconds to the deadline of a request; None if there is none, or if it has ended."""
    seconds = service.config.request_deadline
    if seconds <= 0 or all(request.done for request in requests):
        return None
    return max(0.0, facts.arrival + seconds - time.monotonic())
