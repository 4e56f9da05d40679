"""Sockets that outlive their frontend: the supervisor keeps a duplicate of each, under a token.

A frontend sends a duplicate of a client's socket before the first byte of a response, and releases it when the
connection ends. After its death the successor gets the duplicates and goes on. The kernel counts the bytes of a
connection, so the successor knows how many of them it needs not send: see `bytes_taken`.

Each incarnation of a frontend has a channel of its own to the supervisor, a pair of SOCK_SEQPACKET sockets. A message
that is in it when the frontend dies is not lost: the supervisor reads the channel to its end before it starts the
successor. Messages are one byte, which names the kind, and one token; HOLD carries a descriptor (SCM_RIGHTS). The
answer to ADOPT is the byte, then tokens with as many descriptors, at most BATCH of them; an answer without tokens is
the last.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from asyncio.trsock import TransportSocket
from collections import deque
from typing import NamedTuple, Protocol

HOLD, RELEASE, ADOPT, FORGET = 1, 2, 3, 4
MESSAGE = struct.Struct("=BQ")
BATCH = 128  # descriptors in one message; the kernel allows 253
ANSWER_TIMEOUT = 20.0  # seconds; the supervisor answers within milliseconds unless it is stopped

_INT_BYTES = array.array("i").itemsize
_TCP_INFO_BYTES = 256
_BYTES_ACKED = struct.Struct("=120xQ")  # `tcpi_bytes_acked` of Linux' struct tcp_info
_MAX_READS = 100  # of a counter that changes meanwhile


class HasFileno(Protocol):
    """A socket, or the view of one that an event loop gives."""

    def fileno(self) -> int: ...


def bytes_taken(sock: socket.socket | TransportSocket) -> int | None:
    """Return how many bytes the kernel has taken from the writers of a TCP connection, in all its time.

    The client receives exactly these, unless the connection breaks. It is what the client has acknowledged, plus what
    the kernel still has; a constant of the connection may be added, so only differences count. None: the kernel does
    not tell, or this is no TCP socket.
    """
    try:
        acked = _bytes_acked(sock)
        for _ in range(_MAX_READS):
            (queued,) = struct.unpack("=i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
            before, acked = acked, _bytes_acked(sock)
            if before == acked:  # otherwise bytes were acknowledged in between, and would count twice or never
                return acked + int(queued)
    except (OSError, struct.error):
        pass
    return None


def _bytes_acked(sock: socket.socket | TransportSocket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(_BYTES_ACKED.unpack_from(info)[0])


def receive(channel: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive one message of up to `size` bytes, and its descriptors. Raises OSError.

    Unlike `socket.recv_fds` it lets no program that is started meanwhile inherit them.
    """
    space = socket.CMSG_SPACE(max_fds * _INT_BYTES)
    payload, found, _, _ = channel.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in found:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) // _INT_BYTES * _INT_BYTES])
    return payload, fds.tolist()


def hang_up(sock: socket.socket) -> None:
    """Shut the connection down, then close `sock`: closing alone sends no FIN while another duplicate exists."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class _Queued(NamedTuple):
    """A message that the channel had no room for. `fd`: a duplicate of our own, -1 if it has none."""

    payload: bytes
    fd: int
    sent: asyncio.Future[bool] | None


class KeptSockets:
    """A frontend's side of its channel. Used on the event loop's thread only."""

    def __init__(self, fd: int, incarnation: int, capacity: int) -> None:
        """`fd`: of the channel; this object closes it. `capacity`: sockets that may be kept at once."""
        self._channel = socket.socket(fileno=fd)
        self._channel.setblocking(False)
        self._last_token = incarnation << 32  # tokens are unique over incarnations, and never 0
        self._capacity = capacity
        self._held: set[int] = set()
        self._queue: deque[_Queued] = deque()

    @property
    def capacity(self) -> int:
        """The number of sockets that may be kept at once."""
        return self._capacity

    @property
    def num_held(self) -> int:
        """The number of sockets that the supervisor keeps, or will keep once it has read the channel."""
        return len(self._held)

    async def hold(self, sock: HasFileno) -> int:
        """Have the supervisor keep a duplicate of `sock`. Return its token; 0 if it cannot be kept.

        Once it returns, a death of this process does not end the connection. Call it once a connection.
        """
        if len(self._held) >= self._capacity or sock.fileno() < 0:
            return 0
        self._last_token += 1
        token = self._last_token
        self._held.add(token)
        try:
            kept = await self._send_socket(MESSAGE.pack(HOLD, token), sock.fileno())
        except asyncio.CancelledError:
            self.release(token)
            raise
        if not kept:
            self._held.discard(token)
        return token if kept else 0

    def release(self, token: int) -> None:
        """Have the supervisor shut down and close its duplicate. Unknown tokens, and 0, do nothing."""
        self._end(RELEASE, token)

    def forget(self, token: int) -> None:
        """Have the supervisor close its duplicate, but not shut down: another process goes on with the connection."""
        self._end(FORGET, token)

    def _end(self, kind: int, token: int) -> None:
        if token not in self._held:
            return
        self._held.discard(token)
        payload = MESSAGE.pack(kind, token)
        if self._queue or not self._try_send(payload, -1):
            self._enqueue(_Queued(payload, -1, None))

    def adopt(self) -> dict[int, socket.socket]:
        """Return the sockets that earlier incarnations have held and not released, by token.

        They stay kept until they are released. Call it at the start, before anything is held. It blocks until the
        supervisor has answered. Raises TimeoutError if it does not, OSError without descriptors for the sockets.
        """
        found: dict[int, socket.socket] = {}
        while True:
            self._channel.send(MESSAGE.pack(ADOPT, max(found, default=0)))
            batch = self._read_answer()
            if not batch:
                self._held.update(found)
                return found
            found.update(batch)

    def close(self) -> None:
        """Close the channel, as a death does: what is held stays kept."""
        if self._queue:
            asyncio.get_running_loop().remove_writer(self._channel)
        while self._queue:
            message = self._queue.popleft()
            if message.fd >= 0:
                os.close(message.fd)
            if message.sent is not None and not message.sent.done():
                message.sent.set_result(False)
        self._channel.close()

    def _read_answer(self) -> dict[int, socket.socket]:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(ANSWER_TIMEOUT * 1e3):
            raise TimeoutError(f"the supervisor did not hand over the open connections within {ANSWER_TIMEOUT:g} s")
        payload, fds = receive(self._channel, 1 + 8 * BATCH, BATCH)
        tokens = memoryview(payload)[1:].cast("Q").tolist()
        if len(fds) != len(tokens):  # this process may open no more descriptors
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return {token: socket.socket(fileno=fd) for token, fd in zip(tokens, fds, strict=True)}

    async def _send_socket(self, payload: bytes, fd: int) -> bool:
        """Send a message with a descriptor, in its turn. Return False if the kernel does not allow it."""
        try:
            if not self._queue and self._try_send(payload, fd):
                return True
            # The caller may close `fd`, and the number may be given out again, before the channel has room.
            queued = _Queued(payload, os.dup(fd), asyncio.get_running_loop().create_future())
        except OSError:
            return False
        self._enqueue(queued)
        assert queued.sent is not None
        return await queued.sent

    def _try_send(self, payload: bytes, fd: int) -> bool:
        """Send a message; return False if the channel has no room. Raises OSError if it can never be sent."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            self._channel.sendmsg([payload], rights)
        except BlockingIOError:
            return False
        return True

    def _enqueue(self, message: _Queued) -> None:
        if not self._queue:
            asyncio.get_running_loop().add_writer(self._channel, self._flush)
        self._queue.append(message)

    def _flush(self) -> None:
        """Send what waits, as long as the channel has room."""
        while self._queue:
            message = self._queue[0]
            try:
                if not self._try_send(message.payload, message.fd):
                    return
                sent = True
            except OSError:
                sent = False
            self._queue.popleft()
            if message.fd >= 0:
                os.close(message.fd)
            if message.sent is not None and not message.sent.done():
                message.sent.set_result(sent)
        asyncio.get_running_loop().remove_writer(self._channel)
