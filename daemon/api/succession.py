"""Goes on with the responses that a former process of this frontend has begun.

The kernel tells how far the client of a response is, the outbox has the bytes that it still needs and the state that
these bring it to, and the journal has the output from the first token on. So a response is continued in three steps:
send the rest of the outbox, bring text, stop strings and counts to the committed state, go on as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from daemon.api.access_log import AccessLog
from daemon.api.connections import AdoptedConnection, Connections
from daemon.api.errors import ApiError, lost, to_api_error
from daemon.api.event_ids import BadEventId, Point
from daemon.api.kept_streams import NO_TOKEN, KeptStream
from daemon.api.outbox_writer import OutboxWriter
from daemon.api.render.answer import Answer
from daemon.api.render.apis import APIS
from daemon.api.render.numbered import NumberedRenderer
from daemon.api.render.renderer import EventWriter, Renderer
from daemon.api.request_state import RequestState
from daemon.api.request_tracker import RequestTracker
from daemon.api.respond import whole_body, write_events
from daemon.api.response_facts import ENDED, ResponseFacts, decode_facts
from daemon.api.response_head import EVENT_HEADERS, JSON_HEADERS, raw_error, raw_head
from daemon.api.resumption import resumed
from daemon.api.service import Service
from daemon.api.sse import EventStream
from daemon.api.stream_group import StreamGroup
from daemon.enums import EarlyEnd
from daemon.ipc.kept_sockets import KeptSockets, bytes_taken
from daemon.ipc.outbox import Outbox, OutboxSlot

log = logging.getLogger(__name__)

_LINGER = 5.0  # seconds for a client to close the connection after the end of its response
_CLOSE_GRACE = 1.0  # seconds for responses to end when this process does


@dataclass(slots=True)
class _Adopted:
    """A response to go on with. `state` and `begun`: as the former process has committed it."""

    facts: ResponseFacts
    token: int
    state: list[int]
    begun: bool  # the head of the response is sent, or in the outbox
    connection: AdoptedConnection
    writer: OutboxWriter
    usage: tuple[int, int] | None = None  # prompt tokens, output tokens

    @property
    def ended(self) -> bool:
        """True if every byte of the response is in the outbox, or sent."""
        return bool(self.state[0] & ENDED)


class Succession:
    """All responses of the former process."""

    def __init__(
        self,
        service: Service,
        tracker: RequestTracker,
        outbox: Outbox,
        kept: KeptSockets,
        connections: Connections,
    ) -> None:
        """`connections`: of this process; those of the former one count among them."""
        self._service = service
        self._tracker = tracker
        self._outbox = outbox
        self._connections = connections
        self._kept = kept
        self._streams = tracker.adopted()
        self._access_log = AccessLog(service.config.access_log)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take over all that can be continued; close the other connections, and cancel their requests."""
        sockets = self._kept.adopt()
        adopted = 0
        records = [slot for slot in self._outbox.slots() if slot.token == NO_TOKEN]
        claimed = {slot for record in records for slot in self._keep(record)}
        for slot in self._outbox.slots():
            if slot.token == NO_TOKEN:
                continue
            sock = sockets.pop(slot.token, None)
            found = await self._adopt(slot, sock) if sock is not None else None
            if found is None:
                if not self._is_kept(slot):
                    self._service.page.inc("responses_cut")
                self._close(slot, sock)
                continue
            claimed.update(self._held_by(found))
            self._service.page.inc("responses_adopted")
            adopted += 1
            self._run(found)
        for token, sock in sockets.items():  # idle, or with a request that had not been journaled yet
            sock.close()
            self._kept.release(token)
        self._tracker.abandon_unclaimed(claimed)
        await asyncio.sleep(0)  # so that the readers of kept streams begin
        self._service.kept.settle()
        if adopted or sockets:
            log.info(
                "this process goes on with %d responses of the former one; %d connections without one are closed",
                adopted,
                len(sockets),
            )

    def _keep(self, record: OutboxSlot) -> list[int]:
        """Keep a stream that the former process has kept. Return the journal slots of its requests."""
        try:
            facts = decode_facts(record.facts)
        except msgspec.MsgspecError as e:
            log.warning("a kept stream ends with the former process: %s", e)
            record.close()
            return []
        requests = self._requests_of(facts)
        if len(requests) < len(facts.slots):  # it was just being freed
            record.close()
            return []
        self._service.kept.adopt(facts, list(requests.values()), record)
        return list(requests)

    def _is_kept(self, slot: OutboxSlot) -> bool:
        """Return True if the stream of a response whose connection is lost can be read again."""
        try:
            return self._service.kept.get(decode_facts(slot.facts).id) is not None
        except msgspec.MsgspecError:
            return False

    def _close(self, slot: OutboxSlot, sock: socket.socket | None) -> None:
        slot.close()
        if sock is not None:
            sock.close()
        self._kept.release(slot.token)

    async def _adopt(self, slot: OutboxSlot, sock: socket.socket) -> _Adopted | None:
        """Connect a response to its client and send what the outbox has; return None if that is not possible."""
        taken = bytes_taken(sock)
        try:
            if taken is None:
                raise ValueError("the kernel does not tell what the client has")
            facts = decode_facts(slot.facts)
            tail = slot.tail(taken - slot.baseline)
        except (ValueError, msgspec.MsgspecError) as e:
            log.warning("a response ends with the former process: %s", e)
            return None
        loop = asyncio.get_running_loop()
        connection = AdoptedConnection(self._connections, loop)
        sock.setblocking(False)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: connection, sock)
        except OSError:
            return None
        writer = OutboxWriter(connection, self._service.page, chunked=facts.form.stream and facts.minor >= 1)
        transport.write(tail)
        writer.guard(slot)
        begun = facts.head_sent or slot.committed > 0
        return _Adopted(facts, slot.token, slot.state, begun, connection, writer)

    def _requests_of(self, facts: ResponseFacts) -> dict[int, RequestState]:
        """Return the requests of the response's choices that the journal still has, by slot."""
        named = ((slot, rid, self._streams.get(slot)) for slot, rid in zip(facts.slots, facts.rids, strict=True))
        return {slot: request for slot, rid, request in named if request is not None and request.rid == rid}

    def _held_by(self, found: _Adopted) -> dict[int, RequestState]:
        """Return the same, if they end with the response: it has not ended, and its stream is not kept."""
        if found.ended or self._service.kept.get(found.facts.id) is not None:
            return {}
        return self._requests_of(found.facts)

    def _run(self, found: _Adopted) -> None:
        task = asyncio.get_running_loop().create_task(self._continue(found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all that still runs, because this process ends."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_GRACE)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_GRACE)

    # -- one response -------------------------------------------------------------------------------

    async def _continue(self, found: _Adopted) -> None:
        status: int | None = None
        try:
            found.connection.begin()  # not before: a task that is cancelled before its first step frees nothing
            status = await self._respond(found)
        except (asyncio.CancelledError, ConnectionError):
            pass  # the client has hung up, or this process ends
        except Exception as e:
            to_api_error(e)  # logs it
            found.writer.abort()
        finally:
            found.connection.task = None
            for request in self._held_by(found).values():  # if the client hung up before all was begun
                request.cancel(EarlyEnd.CLIENT)
                request.release()
            found.writer.unguard()
            self._count(found, status)
            await self._hang_up(found)

    async def _respond(self, found: _Adopted) -> int:
        """Send the rest of the response; return its status."""
        facts = found.facts
        try:
            if found.ended:
                await found.writer.finish()
            elif facts.form.stream:
                await self._stream(found)
            else:
                await self._whole(found)
        except ApiError as e:  # nothing is sent yet
            shape = APIS[facts.form.api].renderer.errors
            found.writer.start(raw_error(e, facts.headers, minor=facts.minor, shape=shape), chunked=False)
            await found.writer.write_eof()
            return e.status
        return 200

    async def _stream(self, found: _Adopted) -> None:
        async def start() -> None:
            found.writer.start(_event_head(found.facts), chunked=found.facts.minor >= 1)

        api = APIS[found.facts.form.api]
        start_head = None if found.begun else start
        events = EventStream(found.writer, self._service.config.heartbeat, start_head, ping=api.ping)
        writer: EventWriter | None = None
        async with events:
            try:
                if (kept := self._service.kept.get(found.facts.id)) is not None:
                    try:
                        await self._service.kept.read(kept, events, _point(found, kept), found.writer.abort)
                    finally:
                        found.usage = kept.num_tokens() if found.facts.method == "POST" else None
                    return
                async with self._resumed(found) as (answer, renderer, streams):
                    writer = NumberedRenderer(renderer) if found.facts.keep else renderer
                    await write_events(writer, answer, streams, events)
            except ConnectionError:
                raise
            except Exception as e:
                if not events.started:
                    raise to_api_error(e) from None
                await events.fail((writer or api.renderer.errors).event(to_api_error(e)))

    async def _whole(self, found: _Adopted) -> None:
        try:
            if (kept := self._service.kept.get(found.facts.id)) is not None:
                await _send_whole(found, await self._service.kept.whole(kept, found.writer.abort))
                return
            async with self._resumed(found) as (answer, renderer, streams):
                body = await whole_body(renderer, answer, streams)
                await answer.leave_deadline()
                await _send_whole(found, body)
        except ConnectionError:
            raise
        except Exception as e:
            raise to_api_error(e) from None

    @asynccontextmanager
    async def _resumed(self, found: _Adopted) -> AsyncIterator[tuple[Answer, Renderer, StreamGroup]]:
        """Bring the answer to the committed state; leaving the context cancels the choices that have not ended.

        Raises ApiError if the journal has not all of them, or if the deadline of the request passes.
        """
        facts = found.facts
        requests = self._requests_of(facts)
        if len(requests) < len(facts.slots):
            for request in requests.values():
                request.cancel(EarlyEnd.FRONTEND)
                request.release()
            raise lost("the process that served it died; please send it again", retry=True)
        async with resumed(self._service, facts, list(requests.values()), found.state) as resumption:
            try:
                yield resumption
            finally:
                found.usage = resumption[0].num_tokens()

    # -- its end ------------------------------------------------------------------------------------

    def _count(self, found: _Adopted, status: int | None) -> None:
        facts = found.facts
        word = "disconnect" if status is None else f"{status // 100}xx"
        handler = "streams" if facts.method == "GET" else APIS[facts.form.api].handler
        self._service.page.inc("http_requests", 1, handler, word)
        request = f"{facts.client or '-'} {facts.method} {facts.path}"
        seconds = time.monotonic() - facts.arrival
        self._access_log.write_line(request, status, seconds, facts.request_id, facts.id, found.usage)

    async def _hang_up(self, found: _Adopted) -> None:
        """Close the connection once its client has read everything, or does not close it either."""
        connection = found.connection
        try:
            if connection.transport is not None and not connection.transport.is_closing():
                connection.waiting = True
                connection.transport.write_eof()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER):
                        await connection.lost.wait()
        finally:
            if connection.transport is not None:
                connection.transport.abort()
            self._kept.release(found.token)


def _point(found: _Adopted, kept: KeptStream) -> Point:
    """Return where the reader of a kept stream is, in a step only if it has got no event on this connection yet."""
    with contextlib.suppress(BadEventId):
        began = kept.point_after(found.facts.after)
        if began.state == found.state:
            return began
    return Point(found.state)


async def _send_whole(found: _Adopted, body: bytes) -> None:
    headers = JSON_HEADERS | {"Content-Length": str(len(body))} | found.facts.headers
    found.writer.start(raw_head(200, "OK", headers, minor=found.facts.minor), chunked=False)
    await found.writer.write_eof(body)


def _event_head(facts: ResponseFacts) -> bytes:
    headers = EVENT_HEADERS | facts.headers
    if facts.minor >= 1:
        headers |= {"Transfer-Encoding": "chunked"}
    return raw_head(200, "OK", headers, minor=facts.minor)
