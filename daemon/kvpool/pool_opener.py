"""Opens and closes other engines' KV pools on a thread: a driver may take seconds for a large one.

There is one thread, because drivers take a lock: several calls at the same time take longer than one after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from daemon.ipc import doorbell
from daemon.ipc.process_table import ProcessFacts

log = logging.getLogger(__name__)

POLL = 0.05  # seconds between two looks for a pool that its engine has not published yet
RETRY_DELAYS = (1.0, 4.0, 16.0, 64.0)  # seconds before each further attempt; after the last one the pool stays closed

PoolT = TypeVar("PoolT")


class CannotOpen(Exception):
    """A pool cannot be opened, and a further attempt would fail in the same way."""


class Attempt(NamedTuple, Generic[PoolT]):
    """An attempt to open a pool has ended."""

    engine: int
    incarnation: int
    pool: PoolT | None  # None: it failed
    seconds: float
    error: str = ""
    retry_in: float = 0.0  # seconds until the next attempt; 0: there will be none


def retry_delay(error: Exception, num_failed: int) -> float:
    """Return the seconds until the next attempt after `num_failed` ones; 0 if there should be none."""
    if isinstance(error, CannotOpen) or num_failed > len(RETRY_DELAYS):
        return 0.0
    return RETRY_DELAYS[num_failed - 1]


@dataclass(slots=True, eq=False)
class _Order:
    """A pool that is to be opened."""

    engine: int
    row: ProcessFacts
    due: float = 0.0  # monotonic seconds of the next attempt
    num_failed: int = 0


class PoolOpener(Generic[PoolT]):
    """The thread and its orders. The engine's loop gives orders and takes the ends of attempts; no call waits.

    The thread starts with the first order. It closes before it opens: a pool that stays mapped keeps the memory of a
    dead engine, which its successor may need. The doorbell `bell` rings for each end.

    `open_pool` returns None while the engine has not published its pool. It and `close_pool` run on the thread.
    """

    def __init__(
        self,
        open_pool: Callable[[int, ProcessFacts], PoolT | None],
        close_pool: Callable[[PoolT], None],
        bell: int,
    ) -> None:
        self._open_pool = open_pool
        self._close_pool = close_pool
        self._bell = bell
        self._orders: dict[int, _Order] = {}  # by engine
        self._to_close: deque[PoolT] = deque()
        self._ended: deque[Attempt[PoolT]] = deque()
        self._stopping = False
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None

    def open(self, engine: int, row: ProcessFacts) -> None:
        """Open the pool of the incarnation in `row`. An older order for `engine` ends."""
        with self._changed:
            self._orders[engine] = _Order(engine, row)
            self._wake()

    def cancel(self, engine: int) -> None:
        """Make no further attempt for `engine`. An attempt that has begun still ends."""
        with self._changed:
            self._orders.pop(engine, None)

    def close(self, pool: PoolT) -> None:
        """Close a pool that no copy uses."""
        with self._changed:
            self._to_close.append(pool)
            self._wake()

    def ended(self) -> list[Attempt[PoolT]]:
        """Return the attempts that have ended since the last call. Costs next to nothing if there are none."""
        found = []
        while self._ended:
            found.append(self._ended.popleft())
        return found

    def stop(self, timeout: float) -> bool:
        """End the thread, once it has closed what it should close.

        Return False if a call of the driver holds it for longer than `timeout` seconds.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-pools", daemon=True)
            self._thread.start()
        self._changed.notify()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while self._work():  # a call each: between two of them no local variable keeps a pool mapped
            pass

    def _work(self) -> bool:
        """Close one pool or make one attempt. Return False once the thread must end."""
        with self._changed:
            if self._stopping and not self._to_close:
                return False
            closing = self._to_close.popleft() if self._to_close else None
            order = None if closing is not None else self._next_order()
        if closing is not None:
            self._close_pool(closing)
        elif order is not None:
            self._attempt(order)
        return True

    def _next_order(self) -> _Order | None:
        """Return the order that is due. If there is none, wait for it or for a change, and return None."""
        order = min(self._orders.values(), key=lambda each: each.due, default=None)
        wait = order.due - time.monotonic() if order else None
        if wait is None or wait > 0:
            self._changed.wait(wait)
            return None
        return order

    def _attempt(self, order: _Order) -> None:
        began = time.monotonic()
        incarnation = order.row.incarnation
        try:
            pool = self._open_pool(order.engine, order.row)
        except Exception as e:  # of any kind: no request can migrate there, the engine continues
            order.num_failed += 1
            delay, now = retry_delay(e, order.num_failed), time.monotonic()
            order.due = now + delay
            self._end(order, Attempt(order.engine, incarnation, None, now - began, str(e) or repr(e), delay))
            return
        if pool is None:
            order.due = time.monotonic() + POLL
            return
        self._end(order, Attempt(order.engine, incarnation, pool, time.monotonic() - began))

    def _end(self, order: _Order, attempt: Attempt[PoolT]) -> None:
        with self._changed:
            if not attempt.retry_in and self._orders.get(order.engine) is order:
                del self._orders[order.engine]
        self._ended.append(attempt)
        doorbell.ring(self._bell)
