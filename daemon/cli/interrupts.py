"""Long commands that a signal may end at any moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130  # as shells report SIGINT


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does; also in a background job, which ignores SIGINT."""
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
