"""The KV pools of all engines, as one engine sees them: each is open for as long as its incarnation lives.

`PeerPools` is the interface. `PoolDirectory` implements its life cycle; a backend adds how one pool is opened and
closed (`host_pools`, `cuda_pools`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from daemon.ipc.fabric import Topology
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader

log = logging.getLogger(__name__)

PoolT = TypeVar("PoolT")


class PeerPools(Protocol):
    """The pools of all engines, as one engine sees them, whatever memory they are in."""

    def pool(self, engine: int, incarnation: int = 0) -> Any:
        """Return the pool of that incarnation of `engine`, or None if it is not available.

        The backend's `Transport` takes the result as `peer_pool`.
        """
        ...

    def refresh(self) -> None:
        """Close the pools of dead engines."""
        ...


class PoolDirectory(ABC, Generic[PoolT]):
    """`PeerPools` for one backend. Call it from the engine's loop only.

    `table`: a reader of its own. A reader shared with another object would hide changes from one of them.
    """

    OPEN_ERRORS: ClassVar[tuple[type[Exception], ...]]  # what `_open_pool` raises if the pool cannot be opened

    def __init__(self, table: TableReader, topology: Topology) -> None:
        self._table = table
        self._topology = topology
        self._opened: dict[int, tuple[int, PoolT]] = {}  # engine -> (incarnation, its pool)
        self._refused: dict[int, int] = {}  # engine -> incarnation whose pool cannot be opened; logged once

    def pool(self, engine: int, incarnation: int = 0) -> PoolT | None:
        """Return the pool of `engine`, which the first call opens.

        None if the engine is not up or has not published its pool yet, if `incarnation` is given and is not the
        current one, or if the pool cannot be opened, which is logged once per incarnation. A caller that has block
        ids from one incarnation must name it: they mean nothing in the pool of its successor.
        """
        self.refresh()
        row = self._row(engine)
        if row.state != ProcessState.UP or (incarnation and incarnation != row.incarnation):
            return None
        if engine not in self._opened and self._refused.get(engine) != row.incarnation:
            self._open(engine, row)
        opened = self._opened.get(engine)
        return opened[1] if opened else None

    def refresh(self) -> None:
        """Close the pools of dead engines. Costs one load if nothing changed; call it when the doorbell has rung."""
        if self._table.refresh():
            for engine in [e for e, (incarnation, _) in self._opened.items() if not self._is_current(e, incarnation)]:
                self._close_pool(self._opened.pop(engine)[1])

    def close(self) -> None:
        """Close all pools."""
        for _, pool in self._opened.values():
            self._close_pool(pool)
        self._opened.clear()

    @abstractmethod
    def _open_pool(self, engine: int, row: ProcessFacts) -> PoolT | None:
        """Open the pool of the incarnation in `row`; None if the engine has not published it yet."""

    def _close_pool(self, pool: PoolT) -> None:
        """Close a pool that this directory returns no more."""

    def _open(self, engine: int, row: ProcessFacts) -> None:
        try:
            pool = self._open_pool(engine, row)
        except self.OPEN_ERRORS as e:
            self.refresh()
            if self._is_current(engine, row.incarnation):  # otherwise the engine died during the call
                self._refused[engine] = row.incarnation
                log.error("cannot open the KV pool of engine %d, no request can migrate to it: %s", engine, e)
            return
        if pool is None:
            return
        self.refresh()
        if self._is_current(engine, row.incarnation):
            self._opened[engine] = row.incarnation, pool
        else:
            self._close_pool(pool)

    def _row(self, engine: int) -> ProcessFacts:
        return self._table.rows[self._topology.engine(engine)]

    def _is_current(self, engine: int, incarnation: int) -> bool:
        row = self._row(engine)
        return row.state == ProcessState.UP and row.incarnation == incarnation
