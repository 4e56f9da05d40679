"""The requests that wait for a place in the batch, in order of urgency. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from daemon.engine.request import Request

Urgency = tuple[int, float, int]  # class, key, rid: the smallest goes first, and no two are equal


class WaitingQueue:
    """Requests by urgency; push and remove take O(log n) comparisons."""

    def __init__(self) -> None:
        self._order: list[tuple[Urgency, Request]] = []
        self._entries: dict[int, tuple[Urgency, Request]] = {}
        self.tokens = 0  # tokens to compute, of all waiting requests

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._order)

    @property
    def head(self) -> Request | None:
        """The most urgent request; None if none waits."""
        return self._order[0][1] if self._order else None

    def get(self, rid: int) -> Request | None:
        """Return the waiting request of that id."""
        entry = self._entries.get(rid)
        return entry and entry[1]

    def push(self, request: Request, urgency: Urgency) -> None:
        """Insert `request` at the position that `urgency` gives it."""
        entry = self._entries[request.rid] = (urgency, request)
        insort(self._order, entry)
        self.tokens += request.pending

    def remove(self, request: Request) -> Urgency:
        """Take `request` out and return its urgency. Call it before any field of the request changes."""
        entry = self._entries.pop(request.rid)
        del self._order[bisect_left(self._order, entry)]
        self.tokens -= request.pending
        return entry[0]
