"""Notifications to systemd: one datagram each to $NOTIFY_SOCKET; none if it is not set."""

from __future__ import annotations

import os
import socket


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
