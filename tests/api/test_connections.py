"""Connections of a frontend: deadlines, limits, slow readers, and what is not valid HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from contextlib import asynccontextmanager, suppress
from unittest.mock import Mock

import pytest
from aiohttp import web

from daemon.api import connections as module
from daemon.api.connections import AdoptedConnection, Connections
from daemon.api.frontend import ConnectionAcceptor
from daemon.config import load
from daemon.ipc.metrics_page import FRONTEND, MetricsPage, snapshot
from tests.api.harness import CHAT, HELLO, make_api, until


class Served:
    """An application behind the acceptor and the connections of a frontend."""

    def __init__(self, address: tuple[str, int], page: bytearray, connections: Connections) -> None:
        self.address = address
        self.connections = connections
        self._page = page
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        self.writers.append(writer)
        writer.write(data)
        return reader, writer

    async def adopt(self) -> tuple[socket.socket, AdoptedConnection]:
        """Return a client that reads nothing, and its connection, with a response that has begun."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            sock, _ = listener.accept()
        sock.setblocking(False)
        _, adopted = await loop.connect_accepted_socket(lambda: AdoptedConnection(self.connections, loop), sock)
        return client, adopted

    def cut(self, reason: str) -> float:
        return snapshot(memoryview(self._page), FRONTEND).counter("connections_cut", reason)


@asynccontextmanager
async def serving(api):
    page = bytearray(FRONTEND.nbytes)
    runner = web.AppRunner(api.app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    connections = Connections(runner.server, api.config, MetricsPage(memoryview(page), FRONTEND))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    acceptor = ConnectionAcceptor(listener, connections)
    acceptor.start()
    sweep = asyncio.create_task(connections.sweep())
    served = Served(listener.getsockname(), page, connections)
    try:
        yield served
    finally:
        for writer in served.writers:
            writer.close()
        acceptor.stop()
        listener.close()
        sweep.cancel()
        await runner.cleanup()


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def answer_to(reader: asyncio.StreamReader) -> tuple[int, dict]:
    """Read one response; return its status and its JSON body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(int(fields["content-length"])))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.3)
    monkeypatch.setattr(module, "_SWEEP", 0.02)


def test_connections_without_a_whole_request_head_are_closed(model, fast):
    async def body():
        async with serving(make_api(model)) as served:
            silent, _ = await served.connect()
            half, _ = await served.connect(b"GET /health HTTP/1.1\r\nHost: local")
            slow, drip = await served.connect(b"G")
            second, _ = await served.connect(GET)
            assert (await answer_to(second))[0] == 200
            served.writers[-1].write(b"GET /he")  # the head of its second request stops here

            async def trickle():
                for byte in b"ET /health HTTP/1.1\r\nHost: localhost-is-so-long":
                    drip.write(bytes([byte]))
                    await asyncio.sleep(0.05)

            trickling = asyncio.create_task(trickle())
            assert await asyncio.wait_for(silent.read(), 5) == b""
            for reader in (half, second):
                status, error = await asyncio.wait_for(answer_to(reader), 5)
                assert status == 408 and "did not arrive" in error["error"]["message"]
                assert await reader.read() == b""
            with suppress(ConnectionResetError):  # a byte that arrives after the close resets the connection
                assert (await asyncio.wait_for(answer_to(slow), 5))[0] == 408
            trickling.cancel()
            assert served.cut("no_request") == 4

    asyncio.run(body())


def test_idle_connections_stay_for_keep_alive_and_requests_for_as_long_as_they_need(model, fast):
    api = make_api(model, keep_alive=1.0)
    api.generator.delay = 0.15  # a stream of over a second: longer than the deadline of a head
    api.generator.chunk_size = 3

    async def body():
        async with serving(api) as served:
            idle, _ = await served.connect(GET)
            assert (await answer_to(idle))[0] == 200
            stream, _ = await served.connect(post(HELLO | {"stream": True}))
            text = await asyncio.wait_for(stream.readuntil(b"[DONE]"), 30)
            assert text.startswith(b"HTTP/1.1 200")
            assert await asyncio.wait_for(idle.read(), 5) == b""
            assert served.cut("no_request") == 0

    asyncio.run(body())


def test_the_longest_idle_connection_makes_room_and_no_request_is_interrupted(model):
    api = make_api(model, max_connections=4)
    api.generator.hang_after = 3

    async def body():
        async with serving(api) as served:
            first, _ = await served.connect(post(HELLO | {"stream": True}))
            await first.readuntil(b"data:")
            silent = [(await served.connect())[0] for _ in range(20)]
            client, _ = await served.connect(GET)
            assert (await answer_to(client))[0] == 200
            for reader in silent[:18]:  # the oldest ones
                assert await asyncio.wait_for(reader.read(), 5) == b""
            assert served.cut("limit") == 18
            assert not first.at_eof() and not silent[-1].at_eof()
            # With a request on each, nothing is idle.
            busy = [(await served.connect(post(HELLO | {"stream": True})))[0] for _ in range(3)]
            for reader in busy:
                await reader.readuntil(b"data:")
            refused, _ = await served.connect()
            status, error = await answer_to(refused)
            assert (status, error["error"]["code"]) == (503, "too_many_connections")
            assert served.cut("refused") == 1

    asyncio.run(body())


def test_client_that_never_reads_is_cut_at_the_deadline(model, fast):
    api = make_api(model, request_deadline=0.5)

    async def body():
        async with serving(api) as served:
            _, writer = await served.connect()
            writer.transport.pause_reading()
            for _ in range(100):
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
            await until(lambda: served.cut("slow_reader") == 1)

    asyncio.run(body())


def test_adopted_connections_count_and_are_cut_like_others(model, fast):
    api = make_api(model, request_deadline=0.5, max_connections=1)

    async def body():
        async with serving(api) as served:
            client, adopted = await served.adopt()
            refused, _ = await served.connect()
            status, error = await answer_to(refused)
            assert (status, error["error"]["code"]) == (503, "too_many_connections")
            assert adopted.transport is not None
            adopted.transport.write(bytes(32 << 20))
            await asyncio.wait_for(adopted.lost.wait(), 5)
            assert served.cut("slow_reader") == 1
            client.close()

            client, adopted = await served.adopt()
            adopted.waiting = True  # its response has ended
            reader, _ = await served.connect(GET)
            assert (await answer_to(reader))[0] == 200
            await asyncio.wait_for(adopted.lost.wait(), 5)
            assert served.cut("limit") == 1
            client.close()

    asyncio.run(body())


def test_malformed_requests_get_the_official_error_body_and_one_log_line(model, caplog):
    bad = [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA\x00b: c\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"POST /health HTTP/1.1\r\nTransfer-Encoding: nothing\r\n\r\n",
    ]

    async def body():
        async with serving(make_api(model)) as served:
            for data in bad * 3:
                reader, _ = await served.connect(data)
                status, error = await asyncio.wait_for(answer_to(reader), 5)
                assert status == 400, data
                assert set(error["error"]) == {"message", "type", "param", "code"}
                assert error["error"]["message"].startswith("The request is not valid HTTP: ")
                assert error["error"]["message"].isprintable()

    with caplog.at_level(logging.DEBUG, "daemon"):
        asyncio.run(body())
    lines = [r for r in caplog.records if r.levelno >= logging.INFO]
    assert len(lines) == 1 and lines[0].exc_info is None


def test_bytes_at_random_never_write_a_traceback(model, caplog):
    draw = random.Random(7)
    pieces = [
        *(b"GET ", b"POST ", b"/health", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"\n", b"Host: localhost", b": "),
        *(b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Upgrade: websocket", b"Connection: upgrade"),
        *(b"Expect: 100-continue", b"http://[::1", b"//[", b"%zz", b"CONNECT a:b", b"0", b"\xff", b"\x00", b"5;x="),
    ]

    async def body():
        async with serving(make_api(model)) as served:
            for _ in range(300):
                data = b"".join(draw.choices(pieces, k=draw.randint(1, 14)))
                reader, writer = await served.connect(data)
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 5)
            health, _ = await served.connect(GET)
            assert (await answer_to(health))[0] == 200

    with caplog.at_level(logging.INFO):
        asyncio.run(body())
    assert [r for r in caplog.records if r.exc_info] == []


def test_by_default_there_are_no_more_connections_than_can_be_kept():
    config = load({}, None, {})
    most = module.max_connections(config)
    assert module.max_connections(config, most - 1) == most - 1
    assert module.max_connections(config, most + 1) == most
    assert module.max_connections(load({"max_connections": most + 5}, None, {}), 3) == most + 5


def test_before_a_hand_over_only_requests_that_have_just_arrived_are_waited_for(model, monkeypatch):
    """An idle connection is closed, what a successor continues is left, and the rest is answered first."""
    monkeypatch.setattr(module, "_FIRST_REQUEST", 0.2)

    async def body():
        api = make_api(model)
        api.generator.delay = 0.05
        async with serving(api) as served:
            let_go = served.connections.let_go
            idle, _ = await served.connect(GET)
            assert (await answer_to(idle))[0] == 200
            assert let_go() and await asyncio.wait_for(idle.read(), 5) == b""

            _, new = await served.connect()
            await until(lambda: served.connections._open)
            assert not let_go()
            await asyncio.sleep(0.3)
            assert let_go()
            new.close()

            reader, half = await served.connect(post(HELLO)[:20])
            await until(lambda: any(c.has_partial_head for c in served.connections._open))
            await asyncio.sleep(0.3)
            assert not let_go()
            half.write(post(HELLO)[20:])
            await until(lambda: api.generator.running)
            assert not let_go()
            [connection] = served.connections._open
            connection.continued = True  # as the guard of the response does
            assert let_go() and not connection.waiting
            assert (await answer_to(reader))[0] == 200
            await until(lambda: connection.waiting)
            assert let_go() and await asyncio.wait_for(reader.read(), 5) == b""

    asyncio.run(body())


def test_the_first_bytes_of_a_connection_are_those_of_a_head(model):
    """They can arrive before aiohttp's task, which waits for requests, has run at all."""

    async def body():
        async with serving(make_api(model)) as served:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                connection = served.connections(theirs)
                connection.connection_made(Mock(spec=asyncio.Transport))
                connection.data_received(post(HELLO)[:20])
                assert connection.has_partial_head
                await asyncio.sleep(0)
                assert connection.waiting and connection.has_partial_head
                connection.connection_lost(None)

    asyncio.run(body())
