"""Mapping the other engines' KV pools, each for as long as its incarnation lives.

Pools have no names: the process table says under which descriptor the supervisor holds each, and an engine
opens that through /proc. The kernel lets a process do so that has the supervisor's user and capabilities,
as its children do, unless the supervisor is non-dumpable; then there is no peer, and nothing moves.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Any, NamedTuple, Protocol

from daemon.ipc import segment
from daemon.ipc.fabric import Topology
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader

log = logging.getLogger(__name__)


class PeerPools(Protocol):
    """The pools of all engines, as one of them sees them, whatever memory they are in."""

    def pool(self, engine: int, incarnation: int = 0) -> Any:
        """What a `Transport` of the same backend takes for the pool of `engine`, as it is in that incarnation; None
        if it cannot be had."""
        ...

    def refresh(self) -> None:
        """Let go of the pools of the dead."""
        ...


class _Mapping(NamedTuple):
    incarnation: int
    pool: memoryview


class HostPools:
    """The pools of all engines, as one of them sees them. Called from the engine's loop alone.

    `table`: a reader of its own, not shared with others who wait for changes. `supervisor`: its pid.
    """

    def __init__(self, table: TableReader, topology: Topology, supervisor: int) -> None:
        self._table = table
        self._topology = topology
        self._supervisor = supervisor
        self._mapped: dict[int, _Mapping] = {}
        self._refused: dict[int, int] = {}  # engine: incarnation whose pool could not be had, said once

    def pool(self, engine: int, incarnation: int = 0) -> memoryview | None:
        """The whole pool segment of `engine` (bytes, writable), mapped at the first call.

        None if the engine is not up, if `incarnation` is given and is not the present one, or if its pool cannot
        be had, which is logged once. What was written for one incarnation must name it: block ids of a
        predecessor mean nothing in the pool of its successor.
        """
        self.refresh()
        row = self._row(engine)
        if row.state != ProcessState.UP or (incarnation and incarnation != row.incarnation):
            return None
        if engine not in self._mapped:
            self._map(engine, row)
        held = self._mapped.get(engine)
        return held.pool if held else None

    def refresh(self) -> None:
        """Let go of the pools of the dead. One load when nothing changed; call it when the bell has rung.

        A view that somebody still holds stays valid memory, which nobody reads any more.
        """
        if self._table.refresh():
            gone = [e for e, held in self._mapped.items() if not _stands(self._row(e), held.incarnation)]
            for engine in gone:
                del self._mapped[engine]

    def close(self) -> None:
        """Let go of all pools."""
        self._mapped.clear()

    def _row(self, engine: int) -> ProcessFacts:
        return self._table.rows[self._topology.engine(engine)]

    def _map(self, engine: int, row: ProcessFacts) -> None:
        if self._refused.get(engine) == row.incarnation:
            return
        try:
            pool = _open(self._supervisor, row)
        except OSError as e:
            self.refresh()
            if _stands(self._row(engine), row.incarnation):  # else it died while we looked
                self._refused[engine] = row.incarnation
                log.error("cannot map the KV pool of engine %d, nothing can move there: %s", engine, e)
            return
        # The supervisor publishes a death before it gives the descriptor's number to another pool.
        self.refresh()
        if _stands(self._row(engine), row.incarnation):
            self._mapped[engine] = _Mapping(row.incarnation, pool)


def _stands(row: ProcessFacts, incarnation: int) -> bool:
    return row.state == ProcessState.UP and row.incarnation == incarnation


def _open(supervisor: int, row: ProcessFacts) -> memoryview:
    """Map what the supervisor has under `row.pool_fd`. OSError if that is no file of `row.pool_bytes`."""
    fd = os.open(f"/proc/{supervisor}/fd/{row.pool_fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != row.pool_bytes or found.st_nlink:
            raise OSError(f"descriptor {row.pool_fd} of process {supervisor} is not a pool of {row.pool_bytes} bytes")
        return segment.attach(fd)
    finally:
        os.close(fd)
