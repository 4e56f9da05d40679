"""The response that sends server-sent events.

An event has all text of one token chunk, so a client that reads slowly, or a busy frontend, gets fewer and larger
events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from daemon.api.outbox_writer import OutboxWriter

COMMENT = b": heartbeat\n\n"  # that keeps a connection open; clients ignore it
_CLOSE_GRACE = 5.0  # seconds for a client to read the error event of its stream


class EventStream:
    """A response of server-sent events whose headers go out with the first event.

    Until then a failure can still be a plain response with its own status. If `heartbeat` > 0, `ping` is sent
    after that many seconds without an event. An async context: leaving it stops the heartbeat.
    """

    def __init__(
        self,
        writer: OutboxWriter,
        heartbeat: float,
        start: Callable[[], Awaitable[object]] | None = None,
        *,
        ping: bytes = COMMENT,
    ) -> None:
        """`start`: gives the head of the response to `writer`; None if it has it already."""
        self._writer = writer
        self._ping = ping
        self._start_response = start
        self._interval = heartbeat
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._num_writes = 0  # incomplete writes; an interrupted write stays counted
        self._heartbeat_task: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """True once the head is sent, or will be with the next event."""
        return self._start_response is None

    async def send(self, data: bytes, state: Sequence[int] | None = None) -> None:
        """Write whole events; waits while the client is slow. Raises ConnectionError if it has hung up.

        `state`: what the answer has come to with them, see `response_facts`; None: as before.
        """
        self._num_writes += 1
        if self._start_response is not None:
            await self._start()
        self._last = self._loop.time()
        await self._writer.send(data, state)
        self._num_writes -= 1

    async def close(self, data: bytes = b"") -> None:
        """Write the last events and end the response; waits until the kernel has all of it."""
        self._num_writes += 1
        if self._start_response is not None:
            await self._start()
        await self._writer.write_eof(data)
        self._num_writes -= 1

    async def fail(self, event: bytes) -> None:
        """End the stream with this event of an error. Abort the connection of a client that does not read."""
        try:
            # The buffers are still full, and aiohttp cannot wait for them after an interrupted wait.
            if self._num_writes:
                raise TimeoutError
            async with asyncio.timeout(_CLOSE_GRACE):
                await self.close(event)
        except (TimeoutError, ConnectionError):
            self._writer.abort()

    async def _start(self) -> None:
        start, self._start_response = self._start_response, None
        if start is not None:
            await start()

    async def _heartbeat(self) -> None:
        while True:
            silent = self._loop.time() - self._last
            if silent < self._interval or self._num_writes:
                await asyncio.sleep(max(self._interval - silent, self._interval / 2))
                continue
            try:
                await self.send(self._ping)
            except ConnectionError:
                return  # the task that sends the events gets this error too

    async def __aenter__(self) -> EventStream:
        if self._interval > 0:
            self._heartbeat_task = self._loop.create_task(self._heartbeat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heartbeat_task is not None:
            self._heartbeat_task.cancel()
