"""Doorbells: one eventfd per process. The sender rings it once per batch of messages, always.

There is no flag "the owner is waiting": such a flag loses wake-ups even on x86, and an eventfd write costs a fraction
of a microsecond if the owner does not wait. The owner clears the bell first, *then* reads its rings until all are
empty, then waits again.
"""

from __future__ import annotations

import contextlib
import os
import select


def create() -> int:
    """Create a doorbell and return its descriptor. It is close-on-exec; the supervisor passes it to children."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def ring(fd: int) -> None:
    """Wake the owner now, or let its next wait return at once."""
    with contextlib.suppress(BlockingIOError):  # 2^64 - 2 rings since the last clear: the bell is rung in any case
        os.eventfd_write(fd, 1)


def clear(fd: int) -> bool:
    """Clear the bell; return True if it had been rung."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def wait(fd: int, timeout: float) -> bool:
    """Wait until the bell rings, at most `timeout` seconds, and clear it; return True if it had been rung."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(max(0, int(timeout * 1000)))
    return clear(fd)
