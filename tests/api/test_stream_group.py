"""StreamGroup: several streams read together."""

from __future__ import annotations

import asyncio

import pytest

from daemon.api.generator import EngineLost, TokenChunk
from daemon.api.stream_group import StreamGroup
from daemon.ipc.messages import Finish


class CountingStream:
    """A stream of the tokens 1 to `end`, one in each chunk. `lose`: it raises EngineLost instead of the last one."""

    def __init__(self, end: int, lose: bool = False) -> None:
        self.delivered = 0
        self.cancelled = self.released = False
        self._end, self._lose = end, lose

    async def next(self) -> TokenChunk:
        await asyncio.sleep(0)
        self.delivered += 1
        if self._lose and self.delivered == self._end:
            raise EngineLost("gone")
        return TokenChunk([self.delivered], None, Finish.LENGTH if self.delivered == self._end else Finish.NONE, 0)

    def cancel(self, why: object = None) -> None:
        self.cancelled = True

    def release(self) -> None:
        assert self.cancelled
        self.released = True


@pytest.mark.parametrize("ends", [[5], [3, 7], [1, 4, 2, 9]])
def test_every_chunk_arrives_once_and_in_order(ends):
    streams = [CountingStream(end) for end in ends]

    async def collect() -> list[list[int]]:
        found: list[list[int]] = [[] for _ in ends]
        with StreamGroup() as group:
            for stream in streams:
                group.add(stream)
            while any(len(f) < end for f, end in zip(found, ends, strict=True)):
                for i, chunk in await group.next():
                    found[i] += chunk.tokens
        return found

    assert asyncio.run(collect()) == [list(range(1, end + 1)) for end in ends]
    assert all(s.cancelled and s.released for s in streams)


def test_slow_reader_takes_at_most_one_chunk_ahead():
    streams = [CountingStream(1000), CountingStream(1000)]

    async def read_slowly() -> None:
        with StreamGroup() as group:
            for stream in streams:
                group.add(stream)
            await group.next()
            for _ in range(50):
                await asyncio.sleep(0)

    asyncio.run(read_slowly())
    assert all(s.delivered <= 2 for s in streams)


def test_stopped_stream_delivers_nothing_more_and_others_continue():
    streams = [CountingStream(1000), CountingStream(20)]

    async def collect() -> set[int]:
        seen = set()
        with StreamGroup() as group:
            for stream in streams:
                group.add(stream)
            await group.next()
            group.stop(0)
            while 20 not in seen:
                for i, chunk in await group.next():
                    assert i == 1 or chunk.tokens[0] <= 2
                    seen |= set(chunk.tokens) if i == 1 else set()
        return seen

    assert max(asyncio.run(collect())) == 20
    assert streams[0].cancelled and streams[0].delivered <= 2


def test_error_of_one_stream_ends_all():
    streams = [CountingStream(3, lose=True), CountingStream(1000)]

    async def collect() -> None:
        with StreamGroup() as group:
            for stream in streams:
                group.add(stream)
            while True:
                await group.next()

    with pytest.raises(EngineLost):
        asyncio.run(collect())
    assert all(s.cancelled and s.released for s in streams)
