"""Doorbells: one eventfd a process. Ring it once per batch of messages, always.

There is no "is the peer asleep?" flag: such a flag loses wake-ups even on x86, and an eventfd write costs
a fraction of a microsecond when nobody sleeps. The owner answers first, *then* drains until everything is
empty, then waits again.
"""

from __future__ import annotations

import contextlib
import os
import select


def create() -> int:
    """A new doorbell; the descriptor survives exec when handed on."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def ring(fd: int) -> None:
    """Wake the owner, now or at its next wait."""
    with contextlib.suppress(BlockingIOError):  # 2^64 - 2 unanswered rings: it is as rung as it can be
        os.eventfd_write(fd, 1)


def answer(fd: int) -> bool:
    """Clear the bell; True if it had been rung."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def wait(fd: int, timeout: float) -> bool:
    """Sleep until the bell rings or `timeout` seconds have passed, and answer it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(max(0, int(timeout * 1000)))
    return answer(fd)
