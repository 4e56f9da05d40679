"""A standby: a process that has loaded what a frontend needs, and becomes the successor of one that has ended.

Most of the time between a frontend's death and its successor's first byte is the start of Python and the loading of
the tokenizer. A standby has both behind it. It gets its role as one message on a socket: process number, incarnation,
whether it adopts, and the descriptor of the channel for kept sockets.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from daemon.ipc.child import EXIT_CONFIG, ChildSpec
from daemon.ipc.kept_sockets import receive
from daemon.supervisor.restarts import DoublingDelay

log = logging.getLogger(__name__)

NAME = "standby frontend"
CALM = 2.0  # seconds in which every frontend must have served before a standby is started: it costs CPU time
_FIRST_BACKOFF, _MAX_BACKOFF = 1.0, 60.0  # seconds; a standby that died is replaced, but it is not urgent
_ROLE = struct.Struct("=QQB")


class Started(NamedTuple):
    """A process that runs. `handle`: multiprocess.Process; `pidfd` is registered where the supervisor waits."""

    handle: Any
    pidfd: int


class Standby:
    """Keeps one standby ready. In the supervisor."""

    def __init__(self, start: Callable[[int], Started]) -> None:
        """`start`: starts the process; its argument is the descriptor on which the role will come."""
        self._start = start
        self._process: Started | None = None
        self._socket: socket.socket | None = None
        self._start_at = float("inf")  # monotonic; infinite until all frontends serve
        self._backoff = DoublingDelay(_FIRST_BACKOFF, _MAX_BACKOFF)
        self._loaded = False
        self._failed = False

    @property
    def pidfd(self) -> int:
        return self._process.pidfd if self._process is not None else -1

    @property
    def loaded(self) -> bool:
        """True once the standby has loaded all that it needs: from then on it takes over at once."""
        if not self._loaded and self._socket is not None:
            with contextlib.suppress(OSError):
                self._loaded = bool(self._socket.recv(1, socket.MSG_DONTWAIT))
        return self._loaded

    def tick(self, now: float, *, calm: bool) -> None:
        """Start a standby if there is none and every frontend has served for a while. `calm`: they serve now."""
        if self._process is not None or self._failed:
            return
        if not calm:
            self._start_at = float("inf")
        elif self._start_at == float("inf"):
            self._start_at = now + CALM
        elif now >= self._start_at:
            self._open(now)

    def take(self, spec: ChildSpec) -> Started | None:
        """Give the role of `spec` to the standby and forget it. Return its process; None if there is none."""
        process, sock = self._process, self._socket
        if process is None or sock is None:
            return None
        rights = array.array("i", [spec.keeper_fd])
        try:
            role = _ROLE.pack(spec.process, spec.incarnation, spec.adopt)
            sock.sendmsg([role], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError:  # it has just died, which its pidfd will tell
            return None
        self._forget()
        self._backoff.reset()
        return process

    def reap(self, now: float) -> None:
        """Handle the death of the standby, which the kernel has reported."""
        assert self._process is not None
        handle = self._process.handle
        handle.join()
        code = handle.exitcode
        handle.close()
        os.close(self._process.pidfd)
        self._forget()
        self._failed = code == EXIT_CONFIG
        log.error("the %s died: exit code %d%s", NAME, code, "; no other is started" if self._failed else "")
        self._start_at = now + self._backoff.next()

    def _open(self, now: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = self._start(theirs.fileno())
            self._socket = ours
        except OSError as e:
            ours.close()
            self._start_at = now + self._backoff.next()
            log.error("cannot start a %s: %s", NAME, e)

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None
        self._loaded = False
        self._start_at = float("inf")


def wait_for_role(spec: ChildSpec, fd: int) -> ChildSpec:
    """Wait in the standby for its role. Return `spec` with it. The process ends if the supervisor drops it."""
    with contextlib.closing(socket.socket(fileno=fd)) as sock:
        with contextlib.suppress(ConnectionError):  # it may have its role already
            sock.send(b"L")  # all is loaded
        try:
            payload, fds = receive(sock, _ROLE.size, 1)
        except ConnectionResetError:  # the supervisor has not read our message; the role comes after the error
            payload, fds = receive(sock, _ROLE.size, 1)
    if len(payload) != _ROLE.size or not fds:
        sys.exit(0)
    process, incarnation, adopt = _ROLE.unpack(payload)
    return dataclasses.replace(spec, process=process, incarnation=incarnation, adopt=bool(adopt), keeper_fd=fds[0])
