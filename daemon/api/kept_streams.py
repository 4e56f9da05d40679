"""Streams that their clients have asked to keep: they go on without a connection, and can be read again.

The journal has the output of a kept stream from the first token on. So each reader, whatever it has already, gets the
rest by what a successor of this process does: bring a new answer to the reader's state, and go on. A stream has one
reader at a time. Without a client it is a task of this process, so that stop strings, deadline and metrics
act as usual.

The outbox has a record of each kept stream, a response without connection and bytes: a successor keeps the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from msgspec.structs import replace

from daemon.api.admission import Holder
from daemon.api.errors import ApiError, idempotency_key_reused, stream_cancelled, stream_not_found, to_api_error
from daemon.api.event_ids import END, Journaled, Point, Step, point_after
from daemon.api.generator import TokenStream
from daemon.api.render.answer import Answer
from daemon.api.render.apis import APIS
from daemon.api.render.numbered import NumberedRenderer
from daemon.api.render.renderer import EventWriter
from daemon.api.request_identity import Identity
from daemon.api.request_metrics import RequestMetrics
from daemon.api.respond import whole_body, write_events
from daemon.api.response_facts import ResponseFacts, choice_position, encode_facts
from daemon.api.resumption import resumed
from daemon.api.service import Service
from daemon.api.sse import EventStream
from daemon.enums import EarlyEnd
from daemon.ipc.outbox import Outbox, OutboxFull, OutboxSlot

NO_TOKEN = 0  # token of a record in the outbox: no connection belongs to it
_RECORD_RING = 64  # bytes; a record has no response bytes
_MS = 1e3


class KeptStream:
    """One stream. `error`: what has ended it early. Used by `KeptStreams` only."""

    def __init__(
        self,
        facts: ResponseFacts,
        requests: Sequence[TokenStream],
        metrics: Sequence[RequestMetrics],
        record: OutboxSlot | None,
    ) -> None:
        self.facts = facts
        self.requests = requests
        self.metrics = metrics
        self.error: ApiError | None = None
        self.record = record
        self.ended_at = 0.0  # CLOCK_MONOTONIC seconds; 0: it runs
        self.removed = False
        self.timer: asyncio.TimerHandle | None = None
        self._stop: Callable[[], object] | None = None  # ends its present reader
        self._left = asyncio.Event()
        self._waiting = 0

    @property
    def done(self) -> bool:
        return all(request.done for request in self.requests)

    @property
    def busy(self) -> bool:
        """True if it is being read, or will be as soon as its present reader has left."""
        return self._stop is not None or self._waiting > 0

    def num_tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of output tokens so far."""
        return sum(p.num_tokens for p in self.facts.prompts), sum(counted.tokens for counted in self.metrics)

    def point_after(self, event_id: str) -> Point:
        """Return where a reader is whose last event has this id; empty: it has none. Raises BadEventId."""
        journaled = [Journaled(request.accepted, request.finish) for request in self.requests]
        return point_after(event_id, journaled, usage=self.facts.form.include_usage)

    async def take(self, stop: Callable[[], object], *, patient: bool = False) -> None:
        """Become its only reader, once the present one has left, which is stopped. `stop`: ends the new one soon.

        `patient`: the present one is not stopped.
        """
        self._waiting += 1
        try:
            while self._stop is not None:
                if not patient:
                    self._stop()
                await self._left.wait()
        finally:
            self._waiting -= 1
        self.occupy(stop)

    def occupy(self, stop: Callable[[], object]) -> None:
        """Become the reader of a stream that is not being read."""
        self._stop = stop
        self._left.clear()

    def leave(self) -> None:
        self._stop = None
        self._left.set()


class KeptStreams:
    """The kept streams of one frontend."""

    def __init__(self, service: Service, outbox: Outbox | None = None) -> None:
        """`outbox`: for the records; None: the streams end with this process."""
        self._service = service
        self._outbox = outbox
        self._streams: dict[str, KeptStream] = {}
        self._by_name: dict[bytes, KeptStream] = {}  # of their identities
        self._starting: dict[bytes, asyncio.Event] = {}  # requests that will be kept, by the same
        self._ended: dict[KeptStream, None] = {}  # and not being read; the one to free first comes first
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        service.page.set("streams_kept", 0)

    def add(
        self, facts: ResponseFacts, requests: Sequence[TokenStream], metrics: Sequence[RequestMetrics]
    ) -> KeptStream:
        """Keep a stream whose requests were just submitted. The caller reads it at once."""
        kept = KeptStream(facts, requests, metrics, self._open_record(facts))
        self._insert(kept)
        return kept

    def adopt(self, facts: ResponseFacts, requests: Sequence[TokenStream], record: OutboxSlot) -> None:
        """Keep a stream of a predecessor. Call `settle` once the connections are adopted."""
        page = self._service.page
        metrics = [RequestMetrics.resumed(page, facts.arrival, request.accepted) for request in requests]
        kept = KeptStream(facts, requests, metrics, record)
        for request, counted in zip(requests, metrics, strict=True):
            if request.done:
                counted.close()
        kept.ended_at = record.state[0] / _MS
        self._insert(kept)

    def get(self, id: str) -> KeptStream | None:
        return self._streams.get(id)

    @asynccontextmanager
    async def claim(self, identity: Identity) -> AsyncIterator[KeptStream | None]:
        """Yield what is kept of an earlier request with this identity; None if there is none, and one starts inside.

        Waits while another one starts. Raises ApiError (422) if the earlier request is another one.
        """
        name = identity.name
        while (other := self._starting.get(name)) is not None:
            await other.wait()
        kept = self._by_name.get(name)
        if kept is not None and kept.error is None and not kept.removed:
            assert kept.facts.identity is not None
            if kept.facts.identity.body != identity.body:
                raise idempotency_key_reused()
            yield kept
            return
        self._starting[name] = asyncio.Event()
        try:
            yield None
        finally:
            self._started(name)

    def _started(self, name: bytes) -> None:
        if (waiting := self._starting.pop(name, None)) is not None:
            waiting.set()

    @asynccontextmanager
    async def reading(
        self, kept: KeptStream, stop: Callable[[], object], *, patient: bool = False
    ) -> AsyncIterator[None]:
        """Be the only reader of a stream inside the context. Raises ApiError (404) if it was freed meanwhile.

        `patient`: wait for the end of its present reader.
        """
        try:
            await kept.take(stop, patient=patient)
        except BaseException:
            self._settle(kept)
            raise
        self._ended.pop(kept, None)
        try:
            if kept.removed:
                raise stream_not_found(kept.facts.id)
            yield
        finally:
            kept.leave()
            self._settle(kept)

    async def read(self, kept: KeptStream, events: EventStream, point: Point, stop: Callable[[], object]) -> None:
        """Send the stream from `point` on to its end. It goes on without a reader if this one hangs up.

        `stop`: closes the connection. Raises ConnectionError after a hang-up, ApiError (404) as `reading` does.
        """
        errors = APIS[kept.facts.form.api].renderer.errors
        writer: NumberedRenderer | None = None
        async with self.reading(kept, stop):
            try:
                context = resumed(self._service, kept.facts, kept.requests, point.state, kept.metrics)
                async with context as (answer, renderer, streams):
                    # The head goes out now: its reader learns the id of the stream before the first token.
                    await events.send(b": %b\n\n" % kept.facts.id.encode())
                    writer = NumberedRenderer(renderer)
                    if point.step is not None:
                        out = _events_of(point.step, kept, answer, writer)
                        if choice_position(point.step.word).finish:
                            streams.stop(point.step.choice)
                        await events.send(b"".join(out[point.step.sent :]), writer.state)
                    await write_events(writer, answer, streams, events)
            except ConnectionError:
                raise
            except Exception as e:
                await events.fail((writer or errors).event(self._note(kept, e)))

    async def whole(self, kept: KeptStream, stop: Callable[[], object]) -> bytes:
        """Wait for the end of a kept answer, and return the body of a response with all of it.

        `stop`: closes the connection. Raises ApiError for one that has failed, and as `reading` does.
        """
        async with self.reading(kept, stop, patient=True):
            try:
                state = [0] * (1 + len(kept.requests))
                context = resumed(self._service, kept.facts, kept.requests, state, kept.metrics)
                async with context as (answer, renderer, streams):
                    return await whole_body(renderer, answer, streams)
            except ConnectionError:
                raise
            except Exception as e:
                raise self._note(kept, e) from None

    def cancel(self, kept: KeptStream) -> None:
        """Cancel a stream and forget it, on behalf of its client. A reader of it gets an error event."""
        kept.removed = True
        kept.error = kept.error or stream_cancelled()
        self._forget(kept)
        for request in kept.requests:
            request.cancel(EarlyEnd.CLIENT)
        self._settle(kept)

    def make_room(self, holder: Holder) -> bool:
        """Free the oldest stream that has ended, one of the same client if it has any. Return False if none has."""
        own = (kept for kept in self._ended if kept.facts.owner == holder.client)
        found = next(own, None) or next(iter(self._ended), None)
        if found is None:
            return False
        self._free(found)
        return True

    def settle(self) -> None:
        """Go on with all streams that have no reader."""
        for kept in list(self._streams.values()):
            self._settle(kept)

    def close(self) -> None:
        """Go on with no stream without a reader any more, because this process ends."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    # -- without a reader ---------------------------------------------------------------------------

    def _settle(self, kept: KeptStream) -> None:
        """Do what a stream without a reader needs: free it, wait until it expires, or read it here."""
        if kept.busy or self._closed:
            return
        if kept.removed:
            self._free(kept)
        elif kept.done:
            self._end(kept)
        else:
            self._go_on(kept)

    def _end(self, kept: KeptStream) -> None:
        now = time.monotonic()
        if not kept.ended_at:
            kept.ended_at = now
            if kept.record is not None:
                kept.record.commit(b"", [int(now * _MS)])
        self._ended[kept] = None
        if kept.timer is None:
            left = max(0.0, kept.ended_at + self._service.config.keep_streams - now)
            kept.timer = asyncio.get_running_loop().call_later(left, self._expire, kept)

    def _expire(self, kept: KeptStream) -> None:
        kept.timer = None
        if kept in self._ended:
            self._free(kept)  # otherwise it is being read, and `_settle` follows

    def _go_on(self, kept: KeptStream) -> None:
        task = asyncio.get_running_loop().create_task(self._consume(kept))
        kept.occupy(task.cancel)
        self._tasks.add(task)

        def left(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            kept.leave()
            self._settle(kept)

        task.add_done_callback(left)

    async def _consume(self, kept: KeptStream) -> None:
        """Read a stream to its end without a client: its text is needed for stop strings only."""
        plain = replace(kept.facts.form, logprobs=-1, ids=False, prompt_logprobs=-1, echo_logprobs=False)
        facts = replace(kept.facts, form=plain)
        state = [0] * (1 + len(kept.requests))
        try:
            async with resumed(self._service, facts, kept.requests, state, kept.metrics) as (answer, _, streams):
                while answer.unfinished:
                    for i, chunk in await streams.next():
                        answer.push(i, chunk)
                        if answer.choices[i].finish:
                            streams.stop(i)
        except Exception as e:
            self._note(kept, e)

    def _note(self, kept: KeptStream, error: Exception) -> ApiError:
        """Return the error that has ended the stream: the first of any choice, for all of its readers."""
        if kept.error is None:
            first = next((request.failure for request in kept.requests if request.failure is not None), error)
            kept.error = to_api_error(first)
        return kept.error

    # -- records ------------------------------------------------------------------------------------

    def _open_record(self, facts: ResponseFacts) -> OutboxSlot | None:
        outbox = self._outbox
        if outbox is None:
            return None
        holder = Holder(facts.owner, urgent=False)
        while len(self._streams) >= outbox.num_slots // 2 and self.make_room(holder):
            pass  # the other half is for responses on their way
        while True:
            try:
                return outbox.open(encode_facts(facts), [0], token=NO_TOKEN, baseline=0, ring_bytes=_RECORD_RING)
            except OutboxFull:
                if not self.make_room(holder):
                    self._service.page.inc("responses_unguarded")
                    return None

    def _insert(self, kept: KeptStream) -> None:
        self._streams[kept.facts.id] = kept
        if kept.facts.identity is not None:
            self._by_name[kept.facts.identity.name] = kept
            self._started(kept.facts.identity.name)
        self._service.page.set("streams_kept", len(self._streams))

    def _forget(self, kept: KeptStream) -> None:
        self._streams.pop(kept.facts.id, None)
        identity = kept.facts.identity
        if identity is not None and self._by_name.get(identity.name) is kept:
            del self._by_name[identity.name]
        self._service.page.set("streams_kept", len(self._streams))

    def _free(self, kept: KeptStream) -> None:
        kept.removed = True
        self._forget(kept)
        self._ended.pop(kept, None)
        if kept.timer is not None:
            kept.timer.cancel()
        for request in kept.requests:
            request.release()
        if kept.record is not None:
            kept.record.close()


def _events_of(step: Step, kept: KeptStream, answer: Answer, writer: EventWriter) -> list[bytes]:
    """Return the events of a step. `answer` and `writer` are before it, and are after it then."""
    out: list[bytes] = []
    index, after = step.choice, choice_position(step.word)
    if index == END:
        writer.end(out)
    elif not choice_position(writer.state[1 + index]).begun:
        writer.begin(index, out)
    else:
        begin, chunk = answer.choices[index].position, kept.requests[index].replay(after.position)
        logprobs = chunk.logprobs and chunk.logprobs[begin:]
        chunk = chunk._replace(tokens=chunk.tokens[begin:], logprobs=logprobs, finish=after.finish)
        writer.write(index, answer.push(index, chunk), out)
    return out
