"""The HTTP connections of one frontend: how many, how long they may be silent, and what is not valid HTTP.

A connection costs a descriptor, so a client that opens connections and sends nothing could keep all others out.
Therefore each one must send a whole request head in time, and the one that has been idle for longest is closed when
the limit is reached. A connection with a request in progress is closed only if its client does not read the answer.
Connections that a former process has left count, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.web_protocol import RequestHandler

from daemon.api.errors import ApiError, bad_request, internal, too_many_connections
from daemon.api.rate_limited_log import RateLimitedLog
from daemon.api.response_head import common_headers, raw_error
from daemon.config import Config
from daemon.enums import ConnectionEnd
from daemon.ipc.kept_sockets import KeptSockets
from daemon.ipc.metrics_page import MetricsPage

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

log = logging.getLogger(__name__)

HEAD_TIMEOUT = 10.0  # seconds from the first byte of a request, or from the connect, to the end of its head
_FIRST_REQUEST = 0.25  # seconds from the connect in which a hand-over waits for the first request
_SWEEP = 1.0  # seconds between two looks for connections that are too slow
_OTHER_DESCRIPTORS = 64  # that a frontend may open beside those of its start and its connections
_MAX_CONNECTIONS = 65_536  # of one frontend, if no option says so
_MAX_REASON = 120  # characters of the parser's explanation that an answer repeats


def max_connections(config: Config, num_kept: int = 0) -> int:
    """Return the maximum number of connections: the option, or what the descriptor limit of this process allows.

    `num_kept`: connections that the supervisor can keep. Without the option there are no more, so that each can
    outlive this process. 0: it can keep none.
    """
    if config.max_connections:
        return config.max_connections
    most = min(_MAX_CONNECTIONS, num_kept or _MAX_CONNECTIONS)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return most
    used = len(os.listdir("/proc/self/fd"))
    return max(1, min(most, limit - used - _OTHER_DESCRIPTORS))


class Connections:
    """All connections of one frontend. Used on the event loop's thread only."""

    def __init__(
        self, server: web.Server, config: Config, page: MetricsPage, kept: KeptSockets | None = None
    ) -> None:
        """`kept`: where connections are kept that outlive this process; None: nowhere."""
        self.kept = kept
        self._server = server
        self._keep_alive = config.keep_alive
        self._max_header = config.max_header
        self._write_timeout = config.request_deadline
        self._page = page
        self._loop = asyncio.get_running_loop()
        # The one whose last request is oldest comes first.
        self._open: dict[Connection | AdoptedConnection, None] = {}
        self._limit = max_connections(config, kept.capacity if kept is not None else 0)
        self._limit_log = RateLimitedLog(log, logging.WARNING)
        self.malformed_log = RateLimitedLog(log, logging.WARNING)
        self.failure_log = RateLimitedLog(log, logging.ERROR)
        page.set("max_connections", self._limit)
        page.set("connections", 0)

    def __call__(self, sock: socket.socket) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(self, self._server, self._loop, self._keep_alive, sock, self._max_header)

    def accept(self, sock: socket.socket, head: bytes = b"") -> asyncio.Task[None] | None:
        """Serve a new connection. At the limit, close the longest idle one first, or refuse the new one.

        `head`: of a request that another process has read from it.
        """
        self._page.inc("connections_accepted")
        if len(self._open) >= self._limit:
            self._limit_log.write("the limit of %d connections is reached", self._limit)
            if not self.close_idle():
                self._refuse(sock)
                return None
        return self._loop.create_task(self._serve(sock, head))

    async def _serve(self, sock: socket.socket, head: bytes) -> None:
        _, connection = await self._loop.connect_accepted_socket(lambda: self(sock), sock)
        if head:
            connection.data_received(head)

    def close_idle(self) -> bool:
        """Close the connection that has waited for a request for longest. Return False if none waits."""
        found = next((c for c in self._open if c.waiting), None)
        if found is None:
            return False
        self.cut(found, ConnectionEnd.LIMIT)
        return True

    def let_go(self) -> bool:
        """Close every connection that waits for a further request. Return True if no other would be missed.

        A connection would be missed if its request is not complete yet, or is in progress with a response that no
        successor can continue. The first request of a new connection gets a moment to arrive.
        """
        now, missed = self._loop.time(), False
        for connection in list(self._open):
            if connection.expects_request(now) or not (connection.waiting or connection.continued):
                missed = True
            elif connection.waiting:
                connection.force_close()
        return not missed

    def _refuse(self, sock: socket.socket) -> None:
        self._page.inc("connections_cut", 1, ConnectionEnd.REFUSED)
        with contextlib.suppress(OSError):  # the client has hung up, or takes no byte now
            sock.send(raw_error(too_many_connections(), common_headers()))
        sock.close()

    def cut(self, connection: Connection | AdoptedConnection, reason: ConnectionEnd) -> None:
        """Close a connection and count it."""
        self._open.pop(connection, None)
        self._page.inc("connections_cut", 1, reason)
        if connection.transport is None:
            return
        if reason is ConnectionEnd.SLOW_READER:
            connection.transport.abort()
        else:
            connection.force_close()

    def opened(self, connection: Connection | AdoptedConnection) -> None:
        """Count a new connection, or record that a request has arrived on an open one."""
        self._open.pop(connection, None)
        self._open[connection] = None

    def closed(self, connection: Connection | AdoptedConnection) -> None:
        self._open.pop(connection, None)

    def count_malformed(self, reason: str) -> None:
        self._page.inc("malformed_requests")
        self.malformed_log.write("a request is not valid HTTP: %s", reason)

    async def sweep(self) -> None:
        """Close connections that are too slow, for ever."""
        while True:
            now = self._loop.time()
            for connection in list(self._open):
                if connection.head_overdue(now):
                    if connection.has_partial_head and connection.transport is not None:
                        connection.transport.write(raw_error(_head_timeout(), common_headers()))
                    self.cut(connection, ConnectionEnd.NO_REQUEST)
                elif 0 < self._write_timeout < connection.blocked_for(now):
                    self.cut(connection, ConnectionEnd.SLOW_READER)
            self._page.set("connections", len(self._open))
            await asyncio.sleep(_SWEEP)


class _Watched(BaseProtocol):
    """A connection that knows for how long its client has not read."""

    _loop: asyncio.AbstractEventLoop
    _blocked_since = 0.0  # time from which the client has not read its answer; 0: it reads

    def blocked_for(self, now: float) -> float:
        """Return the seconds in which the client has not read its answer."""
        return now - self._blocked_since if self._blocked_since else 0.0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked_since = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._blocked_since = 0.0


class AdoptedConnection(_Watched):
    """The connection of one response that a former process has begun. What the client sends is not read."""

    has_partial_head = False
    continued = True

    def __init__(self, connections: Connections, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._connections = connections
        self.waiting = False  # True once the response has ended: for its client to close the connection
        self.lost = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None  # writes the response; cancelled if the connection is lost

    def begin(self) -> None:
        """Have the current task cancelled when the client hangs up. Raises ConnectionResetError if it has already."""
        if self.lost.is_set():
            raise ConnectionResetError("the client has hung up")
        self.task = asyncio.current_task()

    def head_overdue(self, now: float) -> bool:
        """Return False: no further request is read."""
        return False

    def expects_request(self, now: float) -> bool:
        """Return False, as `head_overdue` does."""
        return False

    def force_close(self) -> None:
        """Close the connection."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.closed(self)
        super().connection_lost(exc)
        self.lost.set()
        if self.task is not None:
            self.task.cancel()


class Connection(_Watched, RequestHandler):
    """One connection: aiohttp's protocol, with a deadline for request heads and OpenAI's error bodies."""

    def __init__(
        self,
        connections: Connections,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        keep_alive: float,
        sock: socket.socket,
        max_header: int,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=keep_alive,
            access_log=None,  # type: ignore[arg-type]
            logger=log,
            max_line_size=max_header,
            max_field_size=max_header,
        )
        self._connections = connections
        self.sock = sock
        self._token = 0  # under which the connection is kept; 0: it is not
        self._head_since = 0.0  # time from which a request head is due; 0: none is due
        self.has_partial_head = False
        self.continued = False  # a successor of this process can go on with the response that is in progress

    @property
    def waiting(self) -> bool:
        """True if no request is in progress, so that closing the connection interrupts none."""
        return self._waiter is not None and not self._waiter.done()

    def head_overdue(self, now: float) -> bool:
        """Return True if the head of a request should have been complete at `now`."""
        return self.waiting and 0 < self._head_since < now - HEAD_TIMEOUT

    def expects_request(self, now: float) -> bool:
        """Return True if a request has begun to arrive, or if the connection is so new that its first one may."""
        return self.has_partial_head or 0 < now - _FIRST_REQUEST < self._head_since

    async def keep(self) -> int:
        """Have this connection outlive this process; return its token, 0 if it cannot."""
        kept = self._connections.kept
        if not self._token and kept is not None:
            token = await kept.hold(self.sock)
            if self.transport is None:  # the client has hung up meanwhile
                kept.release(token)
                return 0
            self._token = token
        return self._token

    def detach(self) -> None:
        """Close this process's descriptor of the connection, with which another process goes on: without a FIN."""
        if self._token and self._connections.kept is not None:
            self._connections.kept.forget(self._token)
            self._token = 0
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_since = self._loop.time()
        self._connections.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.closed(self)
        if self._token and self._connections.kept is not None:
            with contextlib.suppress(OSError):  # closing sends no FIN while the connection is kept
                self.sock.shutdown(socket.SHUT_RDWR)
            self._connections.kept.release(self._token)
            self._token = 0
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        count = self._request_count
        super().data_received(data)
        if self._request_count != count:
            self._head_since, self.has_partial_head, self.continued = 0.0, False, False
            self._connections.opened(self)
        elif data and (self.waiting or not count):  # the first bytes can arrive before aiohttp's task has started
            self.has_partial_head = True
            self._head_since = self._head_since or self._loop.time()

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that aiohttp cannot parse or the application has failed on, and close the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status < 500:
            reason = _reason(message)
            self._connections.count_malformed(reason)
            error = bad_request(f"The request is not valid HTTP: {reason}.")
        else:
            self.log_exception("a request has failed outside of its handler", exc_info=exc)
            error = internal()
        response = error.response()
        response.headers.update(common_headers())
        response.force_close()
        return response

    def log_exception(self, *args: object, **more: object) -> None:
        error = more.get("exc_info")
        self._connections.failure_log.write(
            str(args[0]) if args else "failure", exc_info=error if isinstance(error, BaseException) else None
        )


def _reason(message: str | None) -> str:
    """Return the first line of the parser's explanation, without control characters and without a full stop."""
    first = (message or "").strip().partition("\n")[0]
    text = "".join(c if c.isprintable() else "?" for c in first[:_MAX_REASON])
    return text.strip().rstrip(":.") or "it cannot be parsed"


def _head_timeout() -> ApiError:
    return ApiError(408, f"The head of the request did not arrive within {HEAD_TIMEOUT:g} seconds.")
