"""The shutdown word: whether the daemon is shutting down, and when it cuts off the requests that still run.

Only the supervisor writes it. It is one u64 in shared memory: CLOCK_MONOTONIC nanoseconds, 0 while the daemon serves.
"""

from __future__ import annotations


class Shutdown:
    """Reads and writes the word."""

    def __init__(self, word: memoryview) -> None:
        self._word = word.cast("Q")

    def begin(self, cut_off: float) -> None:
        """Publish that the daemon is shutting down, until `cut_off` (CLOCK_MONOTONIC seconds) at the latest."""
        self._word[0] = max(1, int(cut_off * 1e9))

    @property
    def cut_off(self) -> float | None:
        """When the requests that still run are cut off, CLOCK_MONOTONIC seconds; None while the daemon serves."""
        return self._word[0] / 1e9 if self._word[0] else None
