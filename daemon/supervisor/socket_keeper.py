"""The supervisor's side of `ipc/kept_sockets`: it keeps the sockets of one frontend, through all its incarnations."""

from __future__ import annotations

import array
import contextlib
import logging
import resource
import socket
import sys
from itertools import islice

from daemon.ipc.fabric import Topology
from daemon.ipc.kept_sockets import ADOPT, BATCH, FORGET, HOLD, MESSAGE, RELEASE, hang_up, receive

log = logging.getLogger(__name__)

_MAX_KEPT = 1 << 16  # sockets of one frontend
_BURST = 256  # messages after which the supervisor looks at its other children
_OTHER_DESCRIPTORS = 128  # of the supervisor, for its files and libraries
_DESCRIPTORS_PER_PROCESS = 8  # doorbell, journal, outbox, pool, pidfd, channels, pipes


def capacity(topology: Topology) -> int:
    """Return how many sockets may be kept for each frontend: this process needs a descriptor for each."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_KEPT if limit == resource.RLIM_INFINITY else capacity_of(limit, topology)


def capacity_of(limit: int, topology: Topology) -> int:
    """Return the same for a supervisor that may open `limit` files."""
    free = limit - _OTHER_DESCRIPTORS - _DESCRIPTORS_PER_PROCESS * topology.processes
    return max(0, min(_MAX_KEPT, free // topology.frontends))


class SocketKeeper:
    """Keeps a duplicate of each client socket that its frontend holds, until the frontend releases it."""

    def __init__(self, name: str) -> None:
        """`name`: of the frontend, for the log."""
        self._name = name
        self._kept: dict[int, socket.socket] = {}  # by token, in rising order
        self._channel: socket.socket | None = None
        self._lost = 0  # sockets that this process had no descriptor for

    def open_channel(self) -> socket.socket:
        """Open the channel of a new incarnation. Return its end, which the caller closes after it was inherited.

        Raises OSError.
        """
        self.close_channel()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        return theirs

    def fileno(self) -> int:
        """Return the descriptor to wait for; -1 while there is no channel."""
        return self._channel.fileno() if self._channel is not None else -1

    def read(self, limit: int = _BURST) -> bool:
        """Handle up to `limit` messages. Return False at the channel's end: its frontend has ended."""
        assert self._channel is not None
        for _ in range(limit):
            try:
                payload, fds = receive(self._channel, MESSAGE.size, 1)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                continue  # it died before it read an answer; the kernel says so once, before its last messages
            if len(payload) != MESSAGE.size:
                return False
            kind, token = MESSAGE.unpack(payload)
            self._handle(kind, token, fds)
        return True

    def close_channel(self) -> None:
        """Handle what a frontend that has ended still had to say, and close its channel. It keeps the sockets."""
        if self._channel is not None:
            self.read(limit=sys.maxsize)
            self._channel.close()
            self._channel = None

    def hang_up_all(self) -> int:
        """Shut down and close all kept sockets: no frontend goes on with them. Return how many there were."""
        for sock in self._kept.values():
            hang_up(sock)
        number = len(self._kept)
        self._kept.clear()
        return number

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def _handle(self, kind: int, token: int, fds: list[int]) -> None:
        if kind == HOLD and fds:
            self._kept[token] = socket.socket(fileno=fds[0])
        elif kind == HOLD:  # the kernel drops a descriptor if this process may open no more
            self._lost += 1
            if self._lost & self._lost - 1 == 0:
                log.error(
                    "%s: %d connections are not kept: this process has no descriptor left", self._name, self._lost
                )
        elif kind == RELEASE and token in self._kept:
            hang_up(self._kept.pop(token))
        elif kind == FORGET and token in self._kept:
            self._kept.pop(token).close()
        elif kind == ADOPT:
            self._answer(token)

    def _answer(self, after: int) -> None:
        """Send the sockets with the first tokens above `after`. The channel holds one answer at a time: it fits."""
        assert self._channel is not None
        tokens = list(islice((token for token in self._kept if token > after), BATCH))
        fds = array.array("i", [self._kept[token].fileno() for token in tokens])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if tokens else []
        payload = bytes([ADOPT]) + array.array("Q", tokens).tobytes()
        with contextlib.suppress(OSError):  # the successor has died already, or fails at its time-out
            self._channel.sendmsg([payload], rights)
