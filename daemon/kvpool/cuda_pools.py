"""The other engines' KV pools in the memory of GPUs, opened by CUDA IPC.

An engine publishes on its board the handle by which its pool is opened. Devices are named by their PCI address: each
process may give the name "cuda:0" to a device of its own.

A pool is open only when a probe has shown that bytes arrive there. The driver's permission is not enough: behind some
bridges and IOMMUs, copies between devices do not arrive.
"""

from __future__ import annotations

import ctypes
import logging
import os
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
from daemon.kvpool.pool_opener import CannotOpen

log = logging.getLogger(__name__)

# A probe writes the end of the dummy block; padding writes its beginning. No supported model has a shorter key per
# token.
PROBE_BYTES = 64
_PROBES = 3  # another engine may probe the same place at the same time
_NO_PEER_ACCESS = 217  # cudaErrorPeerAccessUnsupported


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
    """The pools of all other engines in the memory of GPUs.

    The pool of a dead engine stays mapped until the completion of the last push into it. `table`, `bell`, `own`: see
    `PoolDirectory`. `boards`: one per engine, read by the thread only. `memory`: this engine's pool, of blocks of
    `block_bytes`, on `device` (this process's device number).
    """

    def __init__(
        self,
        runtime: CudaRuntime,
        table: TableReader,
        topology: Topology,
        boards: Mapping[int, BoardReader],
        *,
        memory: OwnPool,
        block_bytes: int,
        device: int,
        bell: int,
        own: int,
    ) -> None:
        super().__init__(table, topology, bell, own)
        self._runtime = runtime
        self._boards = boards
        self._memory = memory
        self._block_bytes = block_bytes
        self._device = device
        self._unused: list[CudaPool] = []  # not in use by this directory, but by pushes in flight

    def refresh(self) -> None:
        """See `PoolDirectory`. Pools that pushes in flight still use stay open."""
        super().refresh()
        for pool in [p for p in self._unused if not p.users]:
            self._unused.remove(pool)
            self._release(pool)

    def _take_all(self) -> list[CudaPool]:
        unused, self._unused = self._unused, []
        return [*super()._take_all(), *unused]

    def _release(self, pool: CudaPool) -> None:
        if pool.users:
            self._unused.append(pool)
            return
        pool.open = False  # from now on no push can use it
        super()._release(pool)

    # -- the thread ----------------------------------------------------------------------------

    def _open_pool(self, engine: int, row: ProcessFacts) -> CudaPool | None:
        published = self._published(engine, row.incarnation)
        if published is None:
            return None
        found = _decode(published)
        self._runtime.set_device(self._device)
        try:
            base = self._runtime.open_ipc(found.handle)
        except (CudaError, ValueError) as e:  # ValueError: a handle of the wrong length
            if isinstance(e, CudaError) and e.code != _NO_PEER_ACCESS:
                raise
            raise CannotOpen(str(e)) from e
        pool = CudaPool(engine, row.incarnation, base, base + found.offset, found.nbytes, found.device)
        try:
            probe(self._runtime, self._memory, pool, self._block_bytes)
        except Exception:
            self._close_pool(pool)
            raise
        return pool

    def _close_pool(self, pool: CudaPool) -> None:
        pool.open = False
        try:
            self._runtime.set_device(self._device)
            self._runtime.close_ipc(pool.base)
        except CudaError as e:
            log.warning("the KV pool of engine %d stays mapped: %s", pool.engine, e)

    def _published(self, engine: int, incarnation: int) -> bytes | None:
        """Return the handle that this incarnation has on its board; None if the board is still its predecessor's."""
        found = self._boards[engine].read()
        facts = decode_engine_facts(found[1]) if found else None
        return facts.pool_handle if facts and facts.incarnation == incarnation else None


def _decode(published: bytes) -> PoolHandle:
    if not published:
        raise CannotOpen("it shares no memory; its own log says why")
    try:
        return decode_pool_handle(published)
    except msgspec.MsgspecError as e:
        raise CannotOpen(f"its handle is invalid: {e}") from e


def probe(runtime: CudaRuntime, own: OwnPool, pool: CudaPool, block_bytes: int) -> None:
    """Copy some bytes to `pool` and back, by the device that is current. Raises CannotOpen if they do not arrive."""
    access = f"no peer access between {own.device} and {pool.device}"
    size = min(PROBE_BYTES, block_bytes)
    end = block_bytes - size
    stream = runtime.create_stream()
    try:
        for _ in range(_PROBES):
            if _round_trip(runtime, stream, own.pointer + end, pool.pointer + end, size):
                return
    except CudaError as e:
        raise CannotOpen(f"{access}: {e}") from e
    finally:
        runtime.destroy_stream(stream)
    raise CannotOpen(f"{access}: copied bytes do not arrive")


def _round_trip(runtime: CudaRuntime, stream: int, source: int, destination: int, size: int) -> bool:
    """Copy a nonce from the host to `source`, to `destination` and back; return True if it comes back intact."""
    nonce = os.urandom(size)
    sent, found = ctypes.create_string_buffer(nonce, size), ctypes.create_string_buffer(size)
    try:
        runtime.copy(source, ctypes.addressof(sent), size, stream)
        runtime.copy(destination, source, size, stream)
        runtime.copy(ctypes.addressof(found), destination, size, stream)
    finally:
        runtime.synchronize_stream(stream)  # also after an error: the buffers must outlive the copies
    return found.raw == nonce
