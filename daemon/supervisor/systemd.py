"""Notifications to systemd: one datagram each to $NOTIFY_SOCKET; none if it is not set."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXTEND_START = "EXTEND_TIMEOUT_USEC=60000000"  # it may take another minute: its own limits end a start that hangs
_EXTEND_EVERY = 20.0  # seconds


class Notifier:
    """Sends notifications. It removes NOTIFY_SOCKET and WATCHDOG_USEC from the environment of later children."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        os.environ.pop("WATCHDOG_USEC", None)

    def send(self, *lines: str) -> None:
        """Send lines such as ``READY=1`` or ``STATUS=...``; a lost datagram is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)  # the supervisor must not wait for a receiver that does not read
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return

    @contextmanager
    def start_extended(self) -> Iterator[None]:
        """Extend systemd's limit of the start while the body of the `with` statement runs.

        It is for what has no limit: a download, a conversion, a build. The thread has ended afterwards.
        """
        ended = threading.Event()

        def extend() -> None:
            self.send(EXTEND_START)
            while not ended.wait(_EXTEND_EVERY):
                self.send(EXTEND_START)

        thread = threading.Thread(target=extend, daemon=True)
        if self._address:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self._address:
                thread.join()
