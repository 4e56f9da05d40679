"""The private parts of aiohttp that llumd uses. If one of these tests fails, aiohttp has changed: read `USED`.

`pyproject.toml` allows one minor version. For the next one: run this file and tests/api with it, mend what is named
here, then raise both limits.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from aiohttp.web_protocol import RequestHandler

from daemon.api.outbox_writer import OutboxWriter
from daemon.ipc.metrics_page import FRONTEND, MetricsPage

ROOT = Path(__file__).parents[2]
USED = {
    "_payload_writer": "daemon/api/respond.py gives a request the writer of its response",
    "_drain_helper": "daemon/api/outbox_writer.py waits for a client that reads slowly",
    "_paused": "daemon/api/outbox_writer.py looks at it with each event, without a call",
    "_waiter": "daemon/api/connections.py knows from it that a connection waits for a request",
    "_request_count": "daemon/api/connections.py knows from it that the head of a request is complete",
    "_loop": "daemon/api/connections.py reads the clock of the event loop",
}


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


def test_a_response_goes_through_the_writer_that_its_request_was_given():
    async def body() -> bytes:
        request = make_mocked_request("GET", "/")
        protocol, transport = BaseProtocol(asyncio.get_running_loop()), Transport()
        protocol.connection_made(transport)
        writer = OutboxWriter(protocol, MetricsPage(memoryview(bytearray(FRONTEND.nbytes)), FRONTEND))
        request._payload_writer = writer
        assert request.writer is writer, USED["_payload_writer"]
        response = web.Response(body=b"{}", content_type="application/json")
        await response.prepare(request)
        await response.write_eof()
        return transport.written

    written = asyncio.run(body())
    assert written.startswith(b"HTTP/1.1 200 OK\r\n") and written.endswith(b"\r\n\r\n{}"), USED["_payload_writer"]


def test_a_protocol_waits_while_its_transport_asks_it_to_pause():
    async def body() -> None:
        protocol = BaseProtocol(asyncio.get_running_loop())
        protocol.connection_made(Transport())
        assert not protocol._paused, USED["_paused"]
        await asyncio.wait_for(protocol._drain_helper(), 1)
        protocol.pause_writing()
        waiting = asyncio.ensure_future(protocol._drain_helper())
        await asyncio.sleep(0)
        assert protocol._paused and not waiting.done(), USED["_drain_helper"]
        protocol.resume_writing()
        await asyncio.wait_for(waiting, 1)
        protocol.pause_writing()
        waiting = asyncio.ensure_future(protocol._drain_helper())
        await asyncio.sleep(0)
        protocol.connection_lost(ConnectionResetError())
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(waiting, 1)

    asyncio.run(body())


def test_a_connection_shows_that_it_waits_and_that_a_head_is_complete():
    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    async def body() -> None:
        loop = asyncio.get_running_loop()
        handler = RequestHandler(web.Server(handle), loop=loop)
        assert handler._loop is loop, USED["_loop"]
        handler.connection_made(Transport())
        await asyncio.sleep(0)
        assert handler._waiter is not None and not handler._waiter.done(), USED["_waiter"]
        before = handler._request_count
        handler.data_received(b"GET / HTTP/1.1\r\nHost: ")
        assert handler._request_count == before, USED["_request_count"]
        handler.data_received(b"localhost\r\n\r\n")
        assert handler._request_count == before + 1, USED["_request_count"]
        await asyncio.sleep(0)
        handler.force_close()

    asyncio.run(body())


def test_the_version_in_use_is_one_that_the_project_allows():
    """The private parts may change with a minor version, so no later one is allowed before it was tried."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [(least, most)] = [found.groups() for d in dependencies if (found := re.match(r"aiohttp>=(.+),<(.+)", d))]
    version = [[int(n) for n in text.split(".")[:2]] for text in (least, importlib.metadata.version("aiohttp"), most)]
    assert version[0] <= version[1] < version[2]
    assert version[2] == [version[0][0], version[0][1] + 1]
