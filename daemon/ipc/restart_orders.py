"""Restart orders: one u64 word a process in shared memory, the incarnation that the supervisor is to replace.

The coordinator writes and the supervisor reads. A word that names an earlier incarnation has been carried out, so no
answer is needed, and a death in between, of any process, leaves nothing to repair.
"""

from __future__ import annotations


class RestartOrders:
    """Reads and writes the words."""

    def __init__(self, words: memoryview) -> None:
        self._words = words.cast("Q")

    def put(self, process: int, incarnation: int) -> None:
        """Order that this incarnation of `process` is replaced."""
        self._words[process] = incarnation

    def of(self, process: int) -> int:
        """Return the incarnation that is to be replaced, or was; 0 if there never was an order."""
        return int(self._words[process])
