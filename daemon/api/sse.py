"""Server-sent events: the bytes of the events, and the response that sends them.

An event has all text of one token chunk, so a client that reads slowly, or a busy frontend, gets fewer and larger
events. All of an event but its text is built once per choice, because this is the daemon's hottest path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec

from daemon.api.errors import ApiError
from daemon.api.outbox_writer import OutboxWriter

DONE = b"data: [DONE]\n\n"
_CLOSE_GRACE = 5.0  # seconds for a client to read the error event of its stream

_json = msgspec.json.Encoder().encode


class ChunkWriter:
    """Encodes the events of one choice. `usage` is the value of an event's usage member, if it has one."""

    __slots__ = ("_chat", "_open", "_tail", "_text_head", "_text_mid", "_text_tail", "_usage")

    def __init__(self, *, chat: bool, id: str, created: int, model: str, index: int, include_usage: bool) -> None:
        self._chat = chat
        head = chunk_head(chat=chat, id=id, created=created, model=model)
        self._open = b'%s"choices":[{"index":%d,' % (head, index)
        self._usage = include_usage
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._text_head = self._open + (b'"delta":{"content":' if chat else b'"text":')
        self._text_mid = (b"}" if chat else b"") + b',"logprobs":'
        self._text_tail = self._text_mid + b'null,"finish_reason":null' + self._tail

    def role(self, usage: Any = None, text: str = "") -> bytes:
        """Return the first event of a chat choice, the only one that names the role."""
        delta = b'"delta":{"role":"assistant","content":%b},"logprobs":null,"finish_reason":null' % _json(text)
        return self._open + delta + self._end(usage)

    def text(self, text: str, logprobs: Any = None, usage: Any = None) -> bytes:
        """Return an event with `text`, encoded as JSON, and the logprobs object of its tokens."""
        if logprobs is None and usage is None:
            return self._text_head + _json(text) + self._text_tail
        middle = self._text_mid + _json(logprobs) + b',"finish_reason":null'
        return self._text_head + _json(text) + middle + self._end(usage)

    def finish(self, reason: str, usage: Any = None) -> bytes:
        """Return the last event of the choice."""
        empty = b'"delta":{}' if self._chat else b'"text":""'
        middle = b',"logprobs":null,"finish_reason":"%s"' % reason.encode()
        return self._open + empty + middle + self._end(usage)

    def last(self, text: str, logprobs: Any, reason: str, usage: Any = None) -> bytes:
        """Return the last event of the choice with the last text and logprobs, if there are any, in it."""
        if not text and logprobs is None:
            return self.finish(reason, usage)
        end = b',"finish_reason":"%s"' % reason.encode()
        return self._text_head + _json(text) + self._text_mid + _json(logprobs) + end + self._end(usage)

    def _end(self, usage: Any) -> bytes:
        return self._tail if usage is None else b'}],"usage":' + _json(usage) + b"}\n\n"


def chunk_head(*, chat: bool, id: str, created: int, model: str) -> bytes:
    """Return the bytes that all events of an answer begin with."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    common = _json({"id": id, "object": kind, "created": created, "model": model})
    return b"data: " + common[:-1] + b","


def usage_chunk(head: bytes, usage: Any) -> bytes:
    """Return the event before [DONE], which has only the totals."""
    return head + b'"choices":[],"usage":' + _json(usage) + b"}\n\n"


class EventStream:
    """A response of server-sent events whose headers go out with the first event.

    Until then a failure can still be a plain response with its own status. If `heartbeat` > 0, a comment is sent
    after that many seconds without an event. An async context: leaving it stops the heartbeat.
    """

    def __init__(
        self, writer: OutboxWriter, heartbeat: float, start: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """`start`: gives the head of the response to `writer`; None if it has it already."""
        self._writer = writer
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

    async def fail(self, error: ApiError) -> None:
        """End the stream with an error event. Abort the connection of a client that does not read."""
        try:
            # The buffers are still full, and aiohttp cannot wait for them after an interrupted wait.
            if self._num_writes:
                raise TimeoutError
            async with asyncio.timeout(_CLOSE_GRACE):
                await self.close(error.event())
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
                await self.send(b": heartbeat\n\n")
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
