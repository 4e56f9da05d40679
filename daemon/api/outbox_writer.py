"""The writer of a response: its bytes go to the outbox first, then to the socket.

aiohttp writes a response's head and body through this object. A successor of this process does the same on a
connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_exceptions import ClientConnectionResetError

from daemon.api.response_facts import ENDED
from daemon.ipc.outbox import OutboxFull, OutboxSlot

if TYPE_CHECKING:
    from multidict import CIMultiDict

    from daemon.ipc.metrics_page import MetricsPage

RING_BYTES = 16 << 10  # of a response at first
_DEFAULT_HIGH = 64 << 10  # bytes that a transport holds back before it asks to pause, if the outbox sets no limit
ROOM_WAIT = 1.0  # seconds for other responses to leave the outbox
ROOM_POLL = 0.02


class OutboxWriter(AbstractStreamWriter):
    """Writes one response. Without a slot it writes to the socket only, and the response ends with this process."""

    def __init__(self, protocol: BaseProtocol, page: MetricsPage, *, chunked: bool = False) -> None:
        """`protocol`: of the connection. `chunked`: the head, already sent, says that the body comes in chunks."""
        self._protocol = protocol
        self._page = page
        self._head = b""
        self._chunked = chunked
        self._slot: OutboxSlot | None = None
        self._ended = False

    # -- outbox -------------------------------------------------------------------------------------

    def guard(self, slot: OutboxSlot) -> None:
        """Commit all further bytes to this slot."""
        self._slot = slot
        self._limit(slot.ring_bytes // 2)

    def unguard(self) -> None:
        """Forget the response: it is complete, or its client has hung up. No effect on later calls."""
        if self._slot is not None:
            self._slot.close()
            self._slot = None
            self._limit(_DEFAULT_HIGH)

    def _limit(self, high: int) -> None:
        """Have `_drain` wait while the transport holds back more than `high` bytes."""
        transport = self._protocol.transport
        if transport is not None and not transport.is_closing():
            transport.set_write_buffer_limits(high=high, low=min(high, high // 4 + 1))

    async def send(self, data: bytes, state: Sequence[int] | None = None) -> None:
        """Write a piece of the body, and wait while the client is slow. Raises ConnectionError if it has hung up.

        `state`: what the response has come to with it; None: as before.
        """
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data, self._head = self._head + data, b""
        if not self._write_now(data, state):
            await self._write_later(data, state)
        elif self._protocol._paused:
            await self._protocol._drain_helper()

    def _write_now(self, data: bytes, state: Sequence[int] | None) -> bool:
        """Commit and write; return False, and do nothing, if the ring has no room. Raises ConnectionError."""
        slot, transport = self._slot, self._protocol.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has hung up")
        size = len(data)
        if slot is not None:
            if size + transport.get_write_buffer_size() > slot.ring_bytes:
                return False
            slot.commit(data, slot.state if state is None else state)
        self.output_size += size
        transport.write(data)
        return True

    async def _write_later(self, data: bytes, state: Sequence[int] | None) -> None:
        while True:
            if (slot := self._slot) is not None:  # else it has been unguarded for lack of room
                await self._make_room(slot, len(data))
            if self._write_now(data, state):
                return await self.drain()

    async def _make_room(self, slot: OutboxSlot, size: int) -> None:
        """Wait until the kernel has taken enough for `size` more bytes, or enlarge the ring.

        If the outbox has no room for a ring that is large enough, the response goes on without it.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + ROOM_WAIT
        while size > slot.ring_bytes // 2:
            if _grow(slot, 2 * size) or size <= slot.ring_bytes or _grow(slot, size):
                break
            if loop.time() >= end:
                self.unguard()
                self._page.inc("responses_unguarded")
                return
            await asyncio.sleep(ROOM_POLL)
        await self.drain_to(slot.ring_bytes - size)
        self._limit(slot.ring_bytes // 2)

    async def drain_to(self, size: int) -> None:
        """Wait until the transport holds back at most `size` bytes."""
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has hung up")
        transport.set_write_buffer_limits(high=size, low=size)
        await self._protocol._drain_helper()

    def abort(self) -> None:
        """Close the connection of a client that does not read."""
        if self._protocol.transport is not None:
            self._protocol.transport.abort()

    async def finish(self) -> None:
        """Wait until the kernel has every byte, then forget the response."""
        if self._slot is not None:
            await self.drain_to(0)
            self.unguard()
        elif self._protocol._paused:
            await self._protocol._drain_helper()

    # -- AbstractStreamWriter -----------------------------------------------------------------------

    async def write(self, chunk: bytes | bytearray | memoryview, *_: object) -> None:
        await self.send(bytes(chunk))

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Write the rest of the body, commit that the response ends with it, and wait until the kernel has it all."""
        if self._ended:
            return
        data, self._head = self._head, b""
        if not self._chunked:
            data += chunk
        elif chunk:
            data += b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunk), chunk)
        else:
            data += b"0\r\n\r\n"
        state = None
        if self._slot is not None:
            state = self._slot.state
            state[0] |= ENDED
        self._ended = True
        if not self._write_now(data, state):
            await self._write_later(data, state)
        await self.finish()

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """Keep the head until the first byte of the body."""
        lines = [status_line, *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "", ""])
        if head.count("\n") + head.count("\r") != 2 * len(lines) + 2:
            raise ValueError("a header contains a line break")
        self.start(head.encode())

    def start(self, head: bytes, *, chunked: bool | None = None) -> None:
        """Begin the response with this head, which goes out with the first byte of the body."""
        self._head = head
        if chunked is not None:
            self._chunked = chunked

    async def drain(self) -> None:
        if self._protocol._paused:
            await self._protocol._drain_helper()

    def enable_chunking(self) -> None:
        self._chunked = True

    def enable_compression(self, encoding: str = "deflate", strategy: int | None = None) -> None:
        raise NotImplementedError("responses are not compressed")


def _grow(slot: OutboxSlot, size: int) -> bool:
    """Enlarge the ring to hold `size` bytes; return False if the outbox has no room now."""
    try:
        slot.grow(1 << (size - 1).bit_length())
    except OutboxFull:
        return False
    return True
