"""Stands in for the children of `test_kept_response`: a frontend that sends one response in several incarnations."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

from daemon.ipc import child
from daemon.ipc.child import EXIT_HANDOVER, STOP_SIGNAL, ChildSpec
from daemon.ipc.kept_sockets import KeptSockets, bytes_taken
from daemon.ipc.messages import EngineState
from tests.ipc.socket_writer import expected

LENGTH = 16_000_000  # bytes of the response
POISON = "poison"  # as the name of the model: every adoption ends the process


def run(spec: ChildSpec, _inherited: object) -> None:
    """Run one child: a frontend, or a process that only waits for its end."""
    fabric = child.initialize(spec)
    signal.signal(STOP_SIGNAL, lambda *_: os._exit(0))
    if spec.keeper_fd >= 0:
        kept = KeptSockets(spec.keeper_fd, spec.incarnation, spec.keeper_capacity)
        adopted = kept.adopt() if spec.adopt else {}
        if adopted and spec.config.main_name == POISON:
            os._exit(1)
        fabric.progress(fabric.process).enter(EngineState.SERVING, spec.incarnation, 60.0)
        for token, sock in adopted.items():
            _go_on(spec.incarnation, kept, token, sock)
        if not adopted:
            _begin(spec.listener_fd, kept)
    else:
        fabric.progress(fabric.process).enter(EngineState.SERVING, spec.incarnation, 60.0)
    while True:
        time.sleep(60)


def _begin(listener_fd: int, kept: KeptSockets) -> None:
    """Accept a connection, have it kept, and die while the kernel takes the response."""
    sock, _ = socket.socket(fileno=listener_fd).accept()
    assert asyncio.run(kept.hold(sock))
    sock.setblocking(False)
    _send(sock, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def _go_on(incarnation: int, kept: KeptSockets, token: int, sock: socket.socket) -> None:
    """Send what the kernel has not taken. The second incarnation hands over in the middle."""
    taken = bytes_taken(sock)
    assert taken is not None
    sock.setblocking(incarnation > 2)
    _send(sock, taken)
    if incarnation == 2:
        os._exit(EXIT_HANDOVER)
    kept.release(token)  # which ends the connection, although this process still has its own duplicate


def _send(sock: socket.socket, start: int) -> None:
    try:
        sock.sendall(expected(start, LENGTH))
    except BlockingIOError:
        return
