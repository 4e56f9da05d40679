"""Admission: at most `max_queued` unfinished requests in one frontend; further requests get status 429."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from daemon.api.generator import Overloaded


class Admission:
    """The queue limit of one frontend.

    A place is taken before any work for a request, so that a burst is not tokenised only to be refused. It is held
    until the request is submitted; from then on the request itself counts.
    """

    def __init__(self, limit: int, num_unfinished: Callable[[], int]) -> None:
        """`num_unfinished`: returns the number of submitted requests that have not ended."""
        self._limit = limit
        self._num_unfinished = num_unfinished
        self._reserved = 0  # places of requests that are admitted and not submitted yet

    def take(self, count: int) -> Places:
        """Take `count` places, released on exit. Raises Overloaded if fewer are left."""
        unfinished = self._num_unfinished()
        if unfinished + self._reserved + count > self._limit:
            raise Overloaded(f"{unfinished} requests are queued or running; try again shortly")
        return Places(self, count)

    def reserve(self, count: int) -> None:
        """Reserve places; a negative `count` releases them."""
        self._reserved += count


class Places:
    """Places in the queue limit. A context: they are held inside it."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def __enter__(self) -> Places:
        self._admission.reserve(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.reserve(-self._count)
