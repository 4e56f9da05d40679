"""What systemd wants to hear: one datagram to $NOTIFY_SOCKET. Silent where there is none."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Takes NOTIFY_SOCKET out of the environment, so that no child inherits it."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        usec = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(usec) / 1e6 if usec.isdigit() else 0.0

    def send(self, *lines: str) -> None:
        """Send for example ``READY=1``, ``STATUS=...``; a lost datagram is no reason to fail."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return
