"""HTTP/1.1 for a load generator: one Protocol callback passes bytes from the socket to a listener.

On a small machine the client competes with the server that it measures, and a general HTTP client needs several
times as much CPU for every streamed token.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

Listener = Callable[[float, bytes], None]
"""Called with the arrival time (perf_counter seconds) and a part of the body."""


class Connection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time."""

    def __init__(self) -> None:
        self.status = 0
        self.reusable = False
        self._kept = False  # True from the second exchange on
        self._buffer = b""
        self._length: int | None = None  # of the body; None: chunked, or until the connection closes
        self._chunked = False
        self._listener: Listener | None = None
        self._done: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses

    def exchange(self, request: bytes, listener: Listener) -> asyncio.Future[int]:
        """Send `request` (head and body). The future yields the status once the body is complete.

        It fails with ConnectionError if the connection breaks first or the answer is not HTTP.
        """
        assert self._transport is not None
        self._kept = self.status != 0
        self.status, self.reusable, self._buffer = 0, False, b""
        self._listener = listener
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    @property
    def stale(self) -> bool:
        """True if the server closed a kept connection before it answered: the request may be sent again."""
        return self._kept and self.status == 0 and not self._buffer

    @property
    def closed(self) -> bool:
        """True if the connection is closed or closing."""
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._listener is None:
            return self.close()  # no exchange is under way
        try:
            self._parse(now, self._buffer + data if self._buffer else data)
        except ValueError as e:
            self._fail(ConnectionError(f"not HTTP: {e}"))
            self.close()

    def _parse(self, now: float, data: bytes) -> None:
        pos = 0
        if self.status == 0:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return
            self._read_head(data[:end].decode("latin-1"))
            pos = end + 4
        if self._chunked:
            self._read_chunks(now, data, pos)
        elif self._length is None:
            self._buffer = b""
            self._deliver(now, data[pos:])
        elif len(data) - pos < self._length:
            self._buffer = data[pos:]
        else:
            self._deliver(now, data[pos : pos + self._length])
            self._finish()

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        fields = {k.strip().lower(): v.strip().lower() for k, _, v in (line.partition(":") for line in lines)}
        self._chunked = "chunked" in fields.get("transfer-encoding", "")
        self._length = int(fields["content-length"]) if "content-length" in fields else None
        self.reusable = fields.get("connection") != "close" and (self._chunked or self._length is not None)
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"starts with {first[:40]!r}")
        self.status = int(status[:3])

    def _read_chunks(self, now: float, data: bytes, pos: int) -> None:
        while (line_end := data.find(b"\r\n", pos)) >= 0:
            size = int(data[pos:line_end].partition(b";")[0], 16)
            start, end = line_end + 2, line_end + 2 + size
            if len(data) < end + 2:
                break
            pos = end + 2
            if size == 0:
                return self._finish()
            self._deliver(now, data[start:end])
        self._buffer = data[pos:]

    def _deliver(self, now: float, part: bytes) -> None:
        if self._listener is not None and part:
            self._listener(now, part)

    def _finish(self) -> None:
        self._listener = None
        if self._done is not None and not self._done.done():
            self._done.set_result(self.status)

    def _fail(self, error: Exception) -> None:
        self._listener = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._listener is None:
            return
        if exc is None and self.status and not self._chunked and self._length is None:
            self._finish()
        else:
            self._fail(ConnectionResetError("closed before the answer was complete"))


class Pool:
    """Keep-alive connections to one server, opened on demand."""

    def __init__(self, url: str) -> None:
        """`url` is the server's base, for example ``http://127.0.0.1:8000``. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL: {url!r}")
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: list[Connection] = []

    def request(self, path: str, body: bytes, api_key: str = "") -> bytes:
        """Return the bytes of a POST of `body` (JSON) to `path`."""
        lines = [
            f"POST {self._path}{path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def take(self) -> Connection:
        """Return an idle connection, or open one. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection

    def give(self, connection: Connection) -> None:
        """Give a connection back; it is kept if another exchange can use it."""
        if connection.reusable and not connection.closed:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
