from __future__ import annotations

import asyncio

import pytest

from daemon.api.generator import EngineLost, Piece
from daemon.api.stream_group import StreamGroup
from daemon.ipc.messages import Finish


class Counting:
    """A stream that always has a token more, up to `end`."""

    def __init__(self, end: int, lose: bool = False) -> None:
        self.given = 0
        self.cancelled = False
        self._end, self._lose = end, lose

    async def next(self) -> Piece:
        await asyncio.sleep(0)
        self.given += 1
        if self._lose and self.given == self._end:
            raise EngineLost("gone")
        return Piece([self.given], None, Finish.LENGTH if self.given == self._end else Finish.NONE, 0)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("ends", [[5], [3, 7], [1, 4, 2, 9]])
def test_every_piece_arrives_once_and_in_order(ends):
    streams = [Counting(end) for end in ends]

    async def collect() -> list[list[int]]:
        found: list[list[int]] = [[] for _ in ends]
        with StreamGroup() as fan:
            for stream in streams:
                fan.add(stream)
            while any(len(f) < end for f, end in zip(found, ends, strict=True)):
                for i, piece in await fan.next():
                    found[i] += piece.tokens
        return found

    assert asyncio.run(collect()) == [list(range(1, end + 1)) for end in ends]
    assert all(s.cancelled for s in streams)


def test_slow_reader_takes_no_more_than_a_piece_ahead():
    streams = [Counting(1000), Counting(1000)]

    async def linger() -> None:
        with StreamGroup() as fan:
            for stream in streams:
                fan.add(stream)
            await fan.next()
            for _ in range(50):
                await asyncio.sleep(0)

    asyncio.run(linger())
    assert all(s.given <= 2 for s in streams)


def test_stopped_stream_gives_nothing_more_and_others_go_on():
    streams = [Counting(1000), Counting(20)]

    async def collect() -> set[int]:
        seen = set()
        with StreamGroup() as fan:
            for stream in streams:
                fan.add(stream)
            await fan.next()
            fan.stop(0)
            while 20 not in seen:
                for i, piece in await fan.next():
                    assert i == 1 or piece.tokens[0] <= 2
                    seen |= set(piece.tokens) if i == 1 else set()
        return seen

    assert max(asyncio.run(collect())) == 20
    assert streams[0].cancelled and streams[0].given <= 2


def test_loss_of_one_ends_all():
    streams = [Counting(3, lose=True), Counting(1000)]

    async def collect() -> None:
        with StreamGroup() as fan:
            for stream in streams:
                fan.add(stream)
            while True:
                await fan.next()

    with pytest.raises(EngineLost):
        asyncio.run(collect())
    assert all(s.cancelled for s in streams)
