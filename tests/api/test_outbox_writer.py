"""The writer of responses on real connections: at any moment the outbox has what the kernel has not taken."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import uvloop
from aiohttp.base_protocol import BaseProtocol
from multidict import CIMultiDict

from daemon.api.outbox_writer import OutboxWriter
from daemon.api.response_facts import ENDED
from daemon.ipc.kept_sockets import bytes_taken
from daemon.ipc.metrics_page import FRONTEND, MetricsPage, snapshot
from daemon.ipc.outbox import Outbox, OutboxSlot

RING = 4 << 10


@dataclass
class Response:
    client: socket.socket
    sock: socket.socket
    protocol: BaseProtocol
    outbox: Outbox
    slot: OutboxSlot
    writer: OutboxWriter
    page: memoryview
    sent: bytes = b""
    got: bytes = b""

    async def send(self, data: bytes, state: list[int]) -> None:
        self.sent += data
        await self.writer.send(data, state)

    def read(self, size: int = 1 << 20) -> None:
        with suppress(BlockingIOError):
            self.got += self.client.recv(size)

    def check(self) -> None:
        """A successor could go on now: what the kernel has and what the outbox has make up all bytes."""
        taken = bytes_taken(self.sock)
        assert taken is not None
        position = taken - self.slot.baseline
        assert self.sent[position:] == self.slot.tail(position)
        assert self.got == self.sent[: len(self.got)]


@asynccontextmanager
async def response(outbox_bytes: int = 256 << 10, before: bytes = b"", **writer: bool) -> AsyncIterator[Response]:
    """Open a response on a connection with small buffers, on which `before` was written already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.setblocking(False)
        sock, _ = listener.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_accepted_socket(lambda: BaseProtocol(loop), sock)
    transport.write(before)
    page, outbox = memoryview(bytearray(FRONTEND.nbytes)), Outbox(memoryview(bytearray(outbox_bytes)))
    taken = bytes_taken(sock)
    assert taken is not None
    baseline = taken + transport.get_write_buffer_size()
    slot = outbox.open(b"facts", [0, 0], token=1, baseline=baseline, ring_bytes=RING)
    made = OutboxWriter(protocol, MetricsPage(page, FRONTEND), **writer)
    made.guard(slot)
    yield Response(client, sock, protocol, outbox, slot, made, page)
    transport.abort()
    await asyncio.sleep(0)
    client.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("seed", range(3))
def test_the_outbox_has_what_the_kernel_has_not_taken(run, seed: int):
    """Pieces of all sizes, to a client that reads slowly: at any moment a successor could go on."""
    rng = random.Random(seed)

    async def write() -> None:
        before = b"x" * rng.choice((0, 50_000))
        async with response(before=before) as r:

            async def read() -> None:
                while True:
                    await asyncio.sleep(0.001)
                    r.read(rng.randrange(1, 20_000))

            reader = asyncio.create_task(read())
            for i in range(150):
                data = rng.randbytes(rng.choice((1, 100, 2000, 5000, 30_000)))
                await r.send(data, [0, i])
                taken = bytes_taken(r.sock)
                assert taken is not None
                position = max(0, taken - r.slot.baseline)
                assert r.slot.tail(position) == r.sent[position:]
                assert r.slot.state == [0, i]
            await r.writer.write_eof(b"end")
            assert r.outbox.slots() == []
            while len(r.got) < len(before + r.sent) + 3:
                await asyncio.sleep(0.001)
            reader.cancel()
            assert r.got == before + r.sent + b"end"

    run(write())


@pytest.mark.parametrize("chunked", [True, False])
def test_the_head_goes_with_the_first_byte_of_the_body(chunked: bool):
    async def write() -> None:
        async with response(chunked=chunked) as r:
            await r.writer.write_headers("HTTP/1.1 200 OK", CIMultiDict({"Name": "value"}))
            assert r.slot.committed == 0
            await r.writer.send(b"one", [0, 1])
            await r.writer.write_eof(b"two")
            await r.writer.write_eof(b"three")
            await asyncio.sleep(0.01)
            r.read()
            body = b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n" if chunked else b"onetwo"
            assert r.got == b"HTTP/1.1 200 OK\r\nName: value\r\n\r\n" + body
            with pytest.raises(ValueError, match="line break"):
                await r.writer.write_headers("HTTP/1.1 200 OK", CIMultiDict({"Name": "a\r\nb: c"}))

    asyncio.run(write())


def test_the_end_is_committed_and_the_slot_stays_until_the_kernel_has_all():
    async def write() -> None:
        async with response() as r:
            data = b"x" * 30_000
            end = asyncio.create_task(r.writer.write_eof(data))
            await asyncio.sleep(0.05)
            assert not end.done()
            assert r.slot.state == [ENDED, 0]
            r.sent = data
            while not end.done():
                r.check()
                r.read()
                await asyncio.sleep(0.001)
            assert r.outbox.slots() == []

    asyncio.run(write())


def test_a_piece_larger_than_the_outbox_goes_without_it_and_is_counted():
    async def write() -> None:
        async with response(outbox_bytes=64 << 10) as r:
            await r.send(b"a" * 10, [0, 1])
            end = asyncio.create_task(r.writer.write_eof(b"b" * 100_000))
            while len(r.got) < 100_010:
                r.read()
                await asyncio.sleep(0.001)
            await end
            assert r.outbox.slots() == []
            assert snapshot(r.page, FRONTEND).counter("responses_unguarded") == 1

    asyncio.run(write())


def test_a_client_that_hangs_up_ends_the_wait():
    async def write() -> None:
        async with response() as r:
            end = asyncio.create_task(r.writer.write_eof(b"x" * 200_000))
            await asyncio.sleep(0.05)
            r.client.close()
            with pytest.raises(ConnectionError):
                await end
                await r.writer.send(b"more")
            r.writer.unguard()
            assert r.outbox.slots() == []

    asyncio.run(write())
