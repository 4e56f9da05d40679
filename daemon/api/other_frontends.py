"""Passes a client's connection to another frontend, with the request that only that one can answer.

The other frontend gets the socket and the request as it was read, and handles both as if it had accepted the
connection and read the request itself. So it checks the client's key itself, and its outbox guards the response as
any other. The connection ends with the response, because requests that follow on it may have been read here.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket
import time
from typing import BinaryIO

from aiohttp import web

from daemon.api.connections import Connection, Connections
from daemon.api.errors import ApiError, bad_request
from daemon.api.outbox_writer import OutboxWriter
from daemon.ipc.fabric import Fabric
from daemon.ipc.kept_sockets import receive
from daemon.ipc.metrics_page import MetricsPage

log = logging.getLogger(__name__)

_MAX_HEAD = 128 << 10  # bytes of a message
_PATIENCE = 2.0  # seconds for the other frontend to take earlier connections
_POLL = 0.02
_OF_THIS_HOP = {b"connection", b"keep-alive", b"content-length", b"transfer-encoding", b"expect", b"upgrade"}


class PassedOn(web.Response):
    """Stands for the response that another frontend gives. It is not sent: the connection is closed here."""


class OtherFrontends:
    """One frontend's channels to all others. Each has a channel of its own for what all others send."""

    def __init__(self, fabric: Fabric, page: MetricsPage) -> None:
        _, self._index = fabric.topology.role(fabric.process)
        channels = fabric.frontend_channels()
        self._incoming = _socket(channels[self._index][0])
        self._outgoing = {k: _socket(pair[1]) for k, pair in enumerate(channels) if k != self._index}
        self._page = page

    def reach(self, frontend: int) -> bool:
        """Return True if it is another frontend of this daemon."""
        return frontend in self._outgoing

    @property
    def count(self) -> int:
        """Number of frontends, with this one."""
        return 1 + len(self._outgoing)

    async def pass_on(self, http: web.Request, frontend: int, body: bytes = b"") -> PassedOn:
        """Let `frontend` answer this request, whose body has been read. Raises ApiError if it takes none now."""
        if not body and http.can_read_body:
            raise bad_request("A request for a stream has no body.")  # it would be read as the next request
        connection = http.protocol
        assert isinstance(connection, Connection)
        try:
            await OutboxWriter(connection, self._page).drain_to(0)  # an earlier response to a client that pipelines
        except ConnectionError:
            return PassedOn()  # the client has hung up
        assert connection.transport is not None
        connection.transport.pause_reading()
        try:
            await self._send(self._outgoing[frontend], _head(http, len(body)), connection.sock.fileno(), body)
        except ApiError:
            connection.transport.resume_reading()
            raise
        connection.detach()
        return PassedOn()

    async def _send(self, channel: socket.socket, head: bytes, fd: int, body: bytes) -> None:
        if not body:
            return await self._send_message(channel, head, [fd])
        with _file_of(body) as file:  # it may be larger than a message
            await self._send_message(channel, head, [fd, file.fileno()])

    async def _send_message(self, channel: socket.socket, head: bytes, fds: list[int]) -> None:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                channel.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                return
            except BlockingIOError:
                pass
            except OSError as e:
                if e.errno != errno.EMSGSIZE and len(head) <= _MAX_HEAD:
                    raise _unreachable() from None
                raise bad_request("The head of the request is too large for this route.") from None
            if time.monotonic() >= end:
                raise _unreachable()
            await asyncio.sleep(_POLL)

    def start(self, connections: Connections) -> None:
        """Take the connections that other frontends pass on, also those that were meant for a predecessor."""
        self._connections = connections
        asyncio.get_running_loop().add_reader(self._incoming, self._take)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._incoming)

    def _take(self) -> None:
        try:
            head, fds = receive(self._incoming, _MAX_HEAD, 2)
        except (BlockingIOError, InterruptedError):
            return
        if fds:  # otherwise this process may open no more descriptors, and the client is hung up on
            sock = socket.socket(fileno=fds[0])
            sock.setblocking(False)
            self._connections.accept(sock, head + b"".join(map(_content, fds[1:])))


def _socket(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))


def _file_of(body: bytes) -> BinaryIO:
    """Return a file in memory with this content."""
    file = open(os.memfd_create("body", os.MFD_CLOEXEC), "r+b")  # noqa: SIM115  the caller closes it
    file.write(body)
    file.flush()
    return file


def _content(fd: int) -> bytes:
    """Return the content of a file in memory, and close it."""
    with open(fd, "rb") as file:
        file.seek(0)  # the sender's position is the same
        return file.read()


def _head(http: web.Request, body_size: int) -> bytes:
    """Return the head of the request as the client has sent it, for a body of this size on the next connection."""
    lines = [f"{http.method} {http.raw_path} HTTP/1.{http.version.minor}".encode("utf-8", "surrogateescape")]
    lines += [b"%b: %b" % pair for pair in http.raw_headers if pair[0].lower() not in _OF_THIS_HOP]
    if body_size:
        lines.append(b"Content-Length: %d" % body_size)
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def _unreachable() -> ApiError:
    message = "The process that has this stream does not answer; try again shortly."
    return ApiError(503, message, type="server_error", code="stream_unreachable", headers={"Retry-After": "2"})
