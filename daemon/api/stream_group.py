"""The choices of an answer, waited for together."""

from __future__ import annotations

import asyncio
from types import TracebackType

from daemon.api.generator import Piece, Stream


class StreamGroup:
    """Waits for whichever streams have something. A context: leaving it cancels what has not ended.

    One stream, the common case, is awaited directly; several have a task each for as long as they live.
    A task waits until its last piece was taken, so what a slow reader leaves stays in the journal.
    """

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._ready: list[tuple[int, Piece]] = []
        self._failed: BaseException | None = None
        self._wake = asyncio.Event()
        self._taken: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, stream: Stream) -> None:
        """The next stream, by index. All are added before the first `next`."""
        self._streams.append(stream)

    async def next(self) -> list[tuple[int, Piece]]:
        """What has come since the last call: (index of the stream, piece), at most one each. Raises Lost."""
        if len(self._streams) == 1:
            return [(0, await self._streams[0].next())]
        if not self._tasks:
            self._taken = [asyncio.Event() for _ in self._streams]
            self._tasks = [asyncio.create_task(self._pump(i)) for i in range(len(self._streams))]
        await self._wake.wait()
        self._wake.clear()
        if self._failed is not None:
            raise self._failed
        ready, self._ready = self._ready, []
        for i, _ in ready:
            self._taken[i].set()
        return ready

    def stop(self, index: int) -> None:
        """Nothing more is wanted of this stream."""
        self._streams[index].cancel()
        if self._tasks:
            self._tasks[index].cancel()

    async def _pump(self, index: int) -> None:
        stream, taken = self._streams[index], self._taken[index]
        try:
            while True:
                piece = await stream.next()
                taken.clear()
                self._ready.append((index, piece))
                self._wake.set()
                if piece.finish:
                    return
                await taken.wait()
        except Exception as e:
            self._failed = e
            self._wake.set()

    def __enter__(self) -> StreamGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.cancel()
        for task in self._tasks:
            task.cancel()
