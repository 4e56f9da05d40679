"""The KV pools of all engines, as one engine sees them: each is open for as long as its incarnation lives.

`PeerPools` is the interface. `PoolDirectory` implements its life cycle; a backend adds how one pool is opened and
closed (`host_pools`, `cuda_pools`), which happens on a thread (`pool_opener`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from daemon.ipc.fabric import Topology
from daemon.ipc.messages import PoolState
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader
from daemon.kvpool.pool_opener import Attempt, PoolOpener

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # that `close` waits for a call of the driver

PoolT = TypeVar("PoolT")


class PeerPools(Protocol):
    """The pools of all engines, as one engine sees them, whatever memory they are in."""

    @property
    def states(self) -> bytes:
        """A PoolState for each engine, for the board."""
        ...

    def pool(self, engine: int, incarnation: int = 0) -> Any:
        """Return the pool of that incarnation of `engine`, or None if it is not open.

        The backend's `Transport` takes the result as `peer_pool`.
        """
        ...

    def refusal(self, engine: int, incarnation: int) -> str:
        """Return why no block can be copied to that incarnation of `engine`, or "" if its pool is open."""
        ...

    def refresh(self) -> None:
        """Have the pools of new engines opened and those of dead engines closed; no call waits for either."""
        ...


class PoolDirectory(ABC, Generic[PoolT]):
    """`PeerPools` for one backend. Call it from the engine's loop only.

    `table`: a reader of its own. A reader shared with another object would hide changes from one of them. `bell`: the
    engine's doorbell, which rings when a pool has been opened. `own`: this engine, which does not open its own pool;
    -1: none.
    """

    def __init__(self, table: TableReader, topology: Topology, bell: int, own: int = -1) -> None:
        self._table = table
        self._topology = topology
        self._live = {i: 0 for i in range(topology.engines) if i != own}  # engine: its incarnation, 0 if it is not up
        self._opened: dict[int, PoolT] = {}  # by engine, of the incarnation in `_live`
        self._failed: set[int] = set()  # engines whose pool could not be opened, of the incarnation in `_live`
        self._opener: PoolOpener[PoolT] = PoolOpener(self._open_pool, self._close_pool, bell)
        self.states = b""
        self._update_states()

    def pool(self, engine: int, incarnation: int = 0) -> PoolT | None:
        """Return the pool of `engine` if it is open.

        None if the engine is not up, if `incarnation` is given and is not the current one, or if the pool is not open
        (yet). A caller that has block ids from one incarnation must name it: they mean nothing in the pool of its
        successor.
        """
        self.refresh()
        if incarnation and incarnation != self._live.get(engine):
            return None
        return self._opened.get(engine)

    def refusal(self, engine: int, incarnation: int) -> str:
        """See `PeerPools`."""
        if self.pool(engine, incarnation) is not None:
            return ""
        if engine in self._failed:
            return f"the KV pool of engine {engine} cannot be opened"
        return f"the KV pool of engine {engine} is not open yet"

    def refresh(self) -> None:
        """Follow the process table, and take what the thread has opened. Costs two loads if nothing changed."""
        changed = self._table.refresh()
        if changed:
            self._follow_table()
        ended = self._opener.ended()
        for attempt in ended:
            self._take(attempt)
        if changed or ended:
            self._update_states()

    def close(self) -> None:
        """Close all pools; leave them to the kernel if a call of the driver is under way for CLOSE_SECONDS more."""
        if not self._opener.stop(CLOSE_SECONDS):
            log.warning("the KV pools of other engines stay mapped: the driver is still opening one")
            return
        opened = [attempt.pool for attempt in self._opener.ended() if attempt.pool is not None]
        for pool in (*opened, *self._take_all()):
            self._close_pool(pool)

    @abstractmethod
    def _open_pool(self, engine: int, row: ProcessFacts) -> PoolT | None:
        """Open the pool of the incarnation in `row`; None if the engine has not published it yet.

        Runs on the thread. Any exception means that the attempt failed; CannotOpen that a further one would, too.
        """

    def _close_pool(self, pool: PoolT) -> None:
        """Close a pool that nothing uses. Runs on the thread."""

    def _take_all(self) -> list[PoolT]:
        """Return all pools that are open. This directory returns none of them any more."""
        pools = list(self._opened.values())
        self._opened.clear()
        return pools

    def _release(self, pool: PoolT) -> None:
        """Have a pool closed that this directory returns no more."""
        self._opener.close(pool)

    def _follow_table(self) -> None:
        for engine, known in self._live.items():
            row = self._table.rows[self._topology.engine(engine)]
            incarnation = row.incarnation if row.state == ProcessState.UP else 0
            if incarnation == known:
                continue
            self._live[engine] = incarnation
            self._failed.discard(engine)
            if engine in self._opened:
                self._release(self._opened.pop(engine))
            if incarnation:
                self._opener.open(engine, row)
            else:
                self._opener.cancel(engine)

    def _take(self, attempt: Attempt[PoolT]) -> None:
        engine, incarnation, pool, seconds, error, retry_in = attempt
        if incarnation != self._live[engine]:  # the engine has died meanwhile
            if pool is not None:
                self._release(pool)
            return
        if pool is not None:
            self._opened[engine] = pool
            self._failed.discard(engine)
            log.info("opened the KV pool of engine %d in %.3f s", engine, seconds)
            return
        self._failed.add(engine)
        next_step = f"; next attempt in {retry_in:.0f} s" if retry_in else ""
        log.error(
            "cannot open the KV pool of engine %d, no request can migrate to it: %s%s", engine, error, next_step
        )

    def _update_states(self) -> None:
        states = bytearray(self._topology.engines)
        for engine in self._live:
            if engine in self._opened:
                states[engine] = PoolState.OPEN
            elif engine in self._failed:
                states[engine] = PoolState.FAILED
        self.states = bytes(states)
