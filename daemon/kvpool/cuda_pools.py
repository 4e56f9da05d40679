"""The other engines' KV pools in the memory of GPUs, opened by CUDA IPC.

An engine publishes on its board the handle by which its pool is opened. Devices are named by their PCI address: each
process may give the name "cuda:0" to a device of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from daemon.ipc.board import BoardReader
from daemon.ipc.fabric import Topology
from daemon.ipc.messages import decode_engine_facts
from daemon.ipc.process_table import ProcessFacts, TableReader
from daemon.kvpool.cudart import CudaError, CudaRuntime
from daemon.kvpool.pool_directory import PoolDirectory

log = logging.getLogger(__name__)


class PoolHandle(msgspec.Struct, array_like=True, frozen=True):
    """How to open an engine's pool; its board carries it as msgpack."""

    handle: bytes  # IPC handle of the allocation
    offset: int  # of the pool in the allocation, bytes
    nbytes: int  # size of the pool
    device: str  # PCI address


_encode = msgspec.msgpack.Encoder().encode
decode_pool_handle = msgspec.msgpack.Decoder(PoolHandle).decode


class OwnPool(NamedTuple):
    """This engine's pool."""

    pointer: int
    nbytes: int
    device: str  # PCI address


@dataclass(slots=True, eq=False)
class CudaPool:
    """A peer's pool, mapped into this process."""

    engine: int
    incarnation: int
    base: int  # address of the mapping
    pointer: int  # address of the pool in it
    nbytes: int
    device: str  # PCI address
    users: int = 0  # pushes into it whose completion has not been returned
    open: bool = True
    refusal: str | None = None  # why no copy can go there, "" if copies arrive; None: not probed yet


def export(runtime: CudaRuntime, own: OwnPool) -> bytes:
    """Return the `PoolHandle` of this engine's pool for its board.

    If CUDA cannot export the memory, log an error and return b"".
    """
    try:
        allocation = runtime.allocation(own.pointer)
        handle = runtime.ipc_handle(allocation.base)
    except (CudaError, OSError) as e:
        log.error("cannot share the KV pool with other processes, no request can migrate to this engine: %s", e)
        return b""
    return bytes(_encode(PoolHandle(handle, own.pointer - allocation.base, own.nbytes, own.device)))


class CudaPools(PoolDirectory[CudaPool]):
    """The pools of all engines in the memory of GPUs. An engine cannot open its own.

    The pool of a dead engine stays mapped until the completion of the last push into it. `table`: see
    `PoolDirectory`. `boards`: one per engine.
    """

    OPEN_ERRORS = (CudaError, ValueError)  # ValueError: the handle is empty or cannot be decoded

    def __init__(
        self, runtime: CudaRuntime, table: TableReader, topology: Topology, boards: Mapping[int, BoardReader]
    ) -> None:
        super().__init__(table, topology)
        self._runtime = runtime
        self._boards = boards
        self._closing: list[CudaPool] = []  # not in use by this directory, but by pushes in flight

    def refresh(self) -> None:
        """Close the pools of dead engines, except those that pushes in flight still use."""
        super().refresh()
        for pool in [p for p in self._closing if not p.users]:
            self._closing.remove(pool)
            self._unmap(pool)

    def close(self) -> None:
        """Close all pools. No copy may be in flight."""
        super().close()
        for pool in self._closing:
            self._unmap(pool)
        self._closing.clear()

    def _open_pool(self, engine: int, row: ProcessFacts) -> CudaPool | None:
        published = self._published(engine, row.incarnation)
        if published is None:
            return None
        found = decode_pool_handle(published)
        base = self._runtime.open_ipc(found.handle)
        return CudaPool(engine, row.incarnation, base, base + found.offset, found.nbytes, found.device)

    def _close_pool(self, pool: CudaPool) -> None:
        if pool.users:
            self._closing.append(pool)
        else:
            self._unmap(pool)

    def _published(self, engine: int, incarnation: int) -> bytes | None:
        """Return the handle that this incarnation has on its board; None if the board is still its predecessor's."""
        found = self._boards[engine].read()
        facts = decode_engine_facts(found[1]) if found else None
        return facts.pool_handle if facts and facts.incarnation == incarnation else None

    def _unmap(self, pool: CudaPool) -> None:
        pool.open = False
        try:
            self._runtime.close_ipc(pool.base)
        except CudaError as e:
            log.warning("the KV pool of dead engine %d stays mapped: %s", pool.engine, e)
