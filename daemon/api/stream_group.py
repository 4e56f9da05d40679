"""Several token streams, one for each choice of an answer, read together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from types import TracebackType

from daemon.api.generator import Overloaded, TokenChunk, TokenStream
from daemon.config import Config
from daemon.enums import EarlyEnd


def first_by(config: Config, arrival: float) -> float:
    """Return when a request must have its first output, CLOCK_MONOTONIC seconds. `arrival`: when it has arrived."""
    return arrival + config.queue_timeout if config.queue_timeout else math.inf


class StreamGroup:
    """Reads whichever streams have output. A context manager: on exit it cancels the streams that have not ended,
    and releases all. Those of a kept stream it never releases, and leaves running if their reader has hung up.

    A single stream, the common case, is awaited directly. Several streams have one task each until they end.
    A task waits until its last chunk was taken, so output that a slow reader has not taken stays in the journal.
    """

    def __init__(
        self, deadline: asyncio.Timeout | None = None, *, kept: bool = False, first_by: float = math.inf
    ) -> None:
        """`deadline`: if it expires, it ends the context with CancelledError.

        `first_by`: CLOCK_MONOTONIC seconds at which the first output must be here.
        """
        self._first_by = first_by
        self._deadline = deadline
        self._kept = kept
        self._streams: list[TokenStream] = []
        self._ready: list[tuple[int, TokenChunk]] = []
        self._error: BaseException | None = None
        self._wake = asyncio.Event()
        self._taken: list[asyncio.Event] = []  # by stream: set once its last chunk was taken
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped: set[int] = set()

    def add(self, stream: TokenStream) -> None:
        """Add a stream at the next index. All streams are added before the first `next`."""
        self._streams.append(stream)

    def __iter__(self) -> Iterator[TokenStream]:
        return iter(self._streams)

    def detach(self) -> list[TokenStream]:
        """Return all streams and forget them, before the first `next`: the caller cancels and releases them."""
        streams, self._streams = self._streams, []
        return streams

    async def next(self) -> list[tuple[int, TokenChunk]]:
        """Wait for output and return (stream index, chunk) pairs, at most one for each stream.

        Raises the error of a stream, once the output that has arrived of the others is taken, and Overloaded if there
        is no output at all in time.
        """
        if self._first_by == math.inf:
            return await self._next()
        left, self._first_by = self._first_by - time.monotonic(), math.inf
        try:
            async with asyncio.timeout(max(0.0, left)) as patience:
                return await self._next()
        except TimeoutError:
            if patience.expired():
                raise Overloaded("no engine had room for the request in time; try again shortly", 2) from None
            raise

    async def _next(self) -> list[tuple[int, TokenChunk]]:
        if len(self._streams) == 1:
            return [(0, await self._streams[0].next())]
        if not self._tasks:
            self._taken = [asyncio.Event() for _ in self._streams]
            self._tasks = [asyncio.create_task(self._pump(i)) for i in range(len(self._streams))]
            for i in self._stopped:
                self._tasks[i].cancel()
        await self._wake.wait()
        if self._error is None:
            self._wake.clear()
        elif not self._ready:
            raise self._error
        ready, self._ready = self._ready, []
        for i, _ in ready:
            self._taken[i].set()
        return ready

    def stop(self, index: int) -> None:
        """Cancel one stream; it delivers no further chunk."""
        self._streams[index].cancel()
        self._stopped.add(index)
        if self._tasks:
            self._tasks[index].cancel()

    async def _pump(self, index: int) -> None:
        stream, taken = self._streams[index], self._taken[index]
        try:
            while True:
                chunk = await stream.next()
                taken.clear()
                self._ready.append((index, chunk))
                self._wake.set()
                if chunk.finish:
                    return
                await taken.wait()
        except Exception as e:
            self._error = e
            self._wake.set()

    def __enter__(self) -> StreamGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = EarlyEnd.ENGINE if error is not None else None
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            why = EarlyEnd.DEADLINE if self._deadline and self._deadline.expired() else EarlyEnd.CLIENT
        for stream in self._streams:
            if not (self._kept and why is EarlyEnd.CLIENT):
                stream.cancel(why)
            if not self._kept:
                stream.release()
        for task in self._tasks:
            task.cancel()
