"""KV pools in the memory of GPUs: opening those of other engines by CUDA IPC, and copying blocks into them.

An engine publishes on its board by what handle its pool is opened. Devices are named by where they sit on the bus:
each process may call its own "cuda:0".

What is copied was written by steps already collected, for the scheduler counts only KV that has been folded; and
blocks that a peer is given to write to are none that a step in flight there writes (`Scheduler.allocate_settled`).
So no copy need wait for the compute stream of either side.

**When a peer dies in mid-copy** its memory may vanish under the copy. The driver may let it finish, fail the copy, or
declare this process's context lost, after which every call fails. The first two end in a completion, the last in a
CudaError out of `CudaTransport`: the engine must end, for the supervisor to start another. To make that rare nothing
new goes to a pool once its engine is known to be dead, and it is closed when the last copy into it has ended.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from daemon.ipc import doorbell
from daemon.ipc.board import BoardReader
from daemon.ipc.fabric import Fabric, Topology
from daemon.ipc.messages import decode_engine_facts
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader
from daemon.kvpool.cudart import CudaError, CudaRuntime
from daemon.kvpool.host_transport import MAX_PUSHES, Completion, Outcome, Run, check_bounds, merge

log = logging.getLogger(__name__)

# A slice is under a millisecond over NVLink and some milliseconds over PCIe, which is what a drain waits for, and
# what a small push may find before it. With two under way the copy engine does not wait for the engine's loop, which
# comes by once a step.
SLICE_BYTES = 256 << 20
SLICE_COPIES = 512  # each costs the loop about 2 us
SLICES_AHEAD = 2

# The end of the dummy block: padding writes its beginning. No token's key of any model that runs here is shorter.
PROBE_BYTES = 64
_PROBES = 3  # another engine may probe the same place at the same time


class PoolHandle(msgspec.Struct, array_like=True, frozen=True):
    """How to open an engine's pool, as its board has it (msgpack)."""

    handle: bytes  # of the allocation
    offset: int  # of the pool in it, bytes
    nbytes: int  # of the pool
    device: str  # PCI address


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PoolHandle).decode


class OwnPool(NamedTuple):
    """This engine's pool."""

    pointer: int
    nbytes: int
    device: str  # PCI address


@dataclass(slots=True, eq=False)
class CudaPool:
    """A peer's pool, mapped here."""

    engine: int
    incarnation: int
    base: int  # of the mapping
    pointer: int  # of the pool in it
    nbytes: int
    device: str  # PCI address
    users: int = 0  # pushes into it whose end has not been told
    open: bool = True
    refusal: str | None = None  # why nothing can go there, "" if it can; None: not tried yet


class CudaKv(NamedTuple):
    """What an engine on a GPU has of the others, and they of it."""

    peers: CudaPools
    mover: CudaTransport
    handle: bytes  # for its board


def for_runner(fabric: Fabric, memory: Any, runtime: CudaRuntime | None = None) -> CudaKv:
    """Join the engine with the others. `memory`: its pool, a tensor uint8[nbytes] in its GPU's memory.

    Call it when CUDA graphs have been captured, from the thread that goes on to use what it returns. Raises OSError
    without a CUDA runtime, CudaError if the device fails.
    """
    runtime = runtime or CudaRuntime()
    device: int = memory.device.index
    runtime.set_device(device)
    own = OwnPool(memory.data_ptr(), memory.numel(), runtime.pci_address(device))
    boards = {i: fabric.board_of(fabric.topology.engine(i)) for i in range(fabric.topology.engines)}
    peers = CudaPools(runtime, fabric.table(), fabric.topology, boards)
    return CudaKv(peers, CudaTransport(runtime, own, device, fabric.bell), export(runtime, own))


def export(runtime: CudaRuntime, own: OwnPool) -> bytes:
    """The `PoolHandle` of this engine's pool for its board; empty, and said why, if the system exports no memory."""
    try:
        allocation = runtime.allocation(own.pointer)
        handle = runtime.ipc_handle(allocation.base)
    except (CudaError, OSError) as e:
        log.error("the KV pool cannot be shared with other processes, nothing can move here: %s", e)
        return b""
    return bytes(_encode(PoolHandle(handle, own.pointer - allocation.base, own.nbytes, own.device)))


class CudaPools:
    """The pools of all engines, as one of them sees them: `PeerPools`. Called from the engine's loop alone.

    `table`: a reader of its own, not shared with others who wait for changes. `boards`: one an engine.
    """

    def __init__(
        self, runtime: CudaRuntime, table: TableReader, topology: Topology, boards: Mapping[int, BoardReader]
    ) -> None:
        self._runtime = runtime
        self._table = table
        self._topology = topology
        self._boards = boards
        self._held: dict[int, CudaPool] = {}
        self._leaving: list[CudaPool] = []  # of the dead, to be closed when the last copy has ended
        self._refused: dict[int, int] = {}  # engine: incarnation whose pool could not be had, said once

    def pool(self, engine: int, incarnation: int = 0) -> CudaPool | None:
        """The pool of `engine`, opened at the first call.

        None if the engine is not up or has not published its pool yet, if `incarnation` is given and is not the
        present one, or if its pool cannot be had, which is logged once. An engine cannot open its own.
        """
        self.refresh()
        row = self._row(engine)
        if row.state != ProcessState.UP or (incarnation and incarnation != row.incarnation):
            return None
        if engine not in self._held:
            self._open(engine, row.incarnation)
        return self._held.get(engine)

    def refresh(self) -> None:
        """Let go of the pools of the dead, but for those that copies are still on their way to."""
        if self._table.refresh():
            gone = [e for e, pool in self._held.items() if not self._stands(e, pool.incarnation)]
            self._leaving += [self._held.pop(e) for e in gone]
        for pool in [p for p in self._leaving if not p.users]:
            self._leaving.remove(pool)
            self._close(pool)

    def close(self) -> None:
        """Let go of all pools. No copy may be on its way."""
        for pool in (*self._held.values(), *self._leaving):
            self._close(pool)
        self._held.clear()
        self._leaving.clear()

    def _row(self, engine: int) -> ProcessFacts:
        return self._table.rows[self._topology.engine(engine)]

    def _stands(self, engine: int, incarnation: int) -> bool:
        row = self._row(engine)
        return row.state == ProcessState.UP and row.incarnation == incarnation

    def _open(self, engine: int, incarnation: int) -> None:
        if self._refused.get(engine) == incarnation:
            return
        published = self._published(engine, incarnation)
        if published is None:
            return
        try:
            told = _decode(published)
            base = self._runtime.open_ipc(told.handle)
        except (CudaError, ValueError) as e:  # ValueError: no handle, or none that can be read
            self.refresh()
            if self._stands(engine, incarnation):  # else it died while we looked
                self._refused[engine] = incarnation
                log.error("cannot open the KV pool of engine %d, nothing can move there: %s", engine, e)
            return
        pool = CudaPool(engine, incarnation, base, base + told.offset, told.nbytes, told.device)
        self.refresh()
        if self._stands(engine, incarnation):
            self._held[engine] = pool
        else:
            self._close(pool)

    def _published(self, engine: int, incarnation: int) -> bytes | None:
        """The handle as that incarnation has it on its board."""
        found = self._boards[engine].read()
        facts = decode_engine_facts(found[1]) if found else None
        return facts.pool_handle if facts and facts.incarnation == incarnation else None

    def _close(self, pool: CudaPool) -> None:
        pool.open = False
        try:
            self._runtime.close_ipc(pool.base)
        except CudaError as e:
            log.warning("the KV pool of engine %d, which is over, stays mapped: %s", pool.engine, e)


# -- copies


class Piece(NamedTuple):
    """One copy: byte offsets in the pool here and in the one there."""

    source: int
    destination: int
    nbytes: int


def slices(runs: Sequence[Run], block_bytes: int, slice_bytes: int, slice_copies: int) -> Iterator[list[Piece]]:
    """The copies of `runs`, in lists of at most `slice_copies` copies and `slice_bytes` bytes."""
    pieces: list[Piece] = []
    room = slice_bytes
    for run in runs:
        at, left = 0, run.length * block_bytes
        while left:
            nbytes = min(left, room)
            pieces.append(Piece(run.source * block_bytes + at, run.destination * block_bytes + at, nbytes))
            at, left, room = at + nbytes, left - nbytes, room - nbytes
            if not room or len(pieces) == slice_copies:
                yield pieces
                pieces, room = [], slice_bytes
    if pieces:
        yield pieces


@dataclass(slots=True, eq=False)
class _Push:
    """One push, from `push` until its end has been told."""

    key: Hashable
    nbytes: int
    pool: CudaPool | None = None  # None: refused before anything was done
    slices: Iterator[list[Piece]] = iter(())
    issued: int = 0  # bytes
    copied: int = 0  # bytes
    flying: int = 0  # slices
    drained: bool = False
    reason: str = ""  # of its failure
    started: float = field(default_factory=time.monotonic)

    @property
    def resting(self) -> bool:
        """Whether no more of it is to be begun."""
        return self.drained or bool(self.reason) or self.issued == self.nbytes

    @property
    def over(self) -> bool:
        return self.resting and not self.flying

    def completion(self) -> Completion:
        outcome = Outcome.DONE if self.copied == self.nbytes else Outcome.CANCELLED
        if self.reason:
            outcome = Outcome.FAILED
        return Completion(self.key, self.copied, time.monotonic() - self.started, outcome, self.reason)


@dataclass(slots=True, eq=False)
class _Slice:
    """A slice under way. `released` is set by the lane's thread: it uses the event no more."""

    push: _Push
    nbytes: int
    event: int
    released: bool = False


class _Lane:
    """The stream to one peer, what is on it, and who takes turns for it.

    The GPU cannot ring a bell, so a thread sleeps for each event and rings. (A function called by the stream would
    need the interpreter lock while the stream stands still, and is not called at all after an error.) One thread a
    stream: events of a stream are reached in order, those of different streams are not.
    """

    def __init__(self, runtime: CudaRuntime, device: int, bell: int, name: str) -> None:
        self._runtime = runtime
        self._device = device
        self._bell = bell
        self.stream = runtime.create_stream()
        self.flying: deque[_Slice] = deque()
        self.turns: deque[_Push] = deque()
        self._spent: deque[_Slice] = deque()  # their events are used again
        self._watched: queue.SimpleQueue[_Slice | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._thread.start()

    def begin(self, push: _Push, here: int, there: int) -> None:
        """Put the next slice of `push` on the stream. CudaError: some of its copies may be there, and no event."""
        pieces = next(push.slices)
        for piece in pieces:
            self._runtime.copy(there + piece.destination, here + piece.source, piece.nbytes, self.stream)
        event = self._event()
        self._runtime.record(event, self.stream)
        begun = _Slice(push, sum(piece.nbytes for piece in pieces), event)
        push.issued += begun.nbytes
        push.flying += 1
        self.flying.append(begun)
        self._watched.put(begun)

    def end(self) -> None:
        """The oldest slice is over."""
        ended = self.flying.popleft()
        ended.push.flying -= 1
        if not ended.push.reason:
            ended.push.copied += ended.nbytes
        self._spent.append(ended)

    def close(self) -> None:
        """Give everything back; nothing may be on the stream."""
        self._watched.put(None)
        self._thread.join()
        for spent in self._spent:
            self._runtime.destroy_event(spent.event)
        self._runtime.destroy_stream(self.stream)

    def _event(self) -> int:
        if self._spent and self._spent[0].released:
            return self._spent.popleft().event
        return self._runtime.create_event()

    def _watch(self) -> None:
        try:
            self._runtime.set_device(self._device)
        except CudaError as e:  # the loop polls at each step all the same
            log.error("no thread for the bell: %s", e)
        while (watched := self._watched.get()) is not None:
            try:
                self._runtime.synchronize_event(watched.event)
            except CudaError as e:
                log.error("a copy of KV blocks has failed: %s", e)  # the loop finds out by itself
            watched.released = True
            doorbell.ring(self._bell)


class CudaTransport:
    """The `Transport` between pools in GPUs' memory: copies on a stream of low priority for each peer.

    The engine's loop begins the copies, slice by slice, and sees their end; threads only wake it. So a call takes the
    time in which a slice is begun, not copied; only a peer's first push waits, until a probe has shown that bytes
    arrive there. `push`, `completed` and `close` raise CudaError when the device has failed and the engine must end.

    `own`: this engine's pool, on `device` as this process numbers it; `bell`: this engine's doorbell.
    """

    def __init__(
        self,
        runtime: CudaRuntime,
        own: OwnPool,
        device: int,
        bell: int,
        *,
        slice_bytes: int = SLICE_BYTES,
        slice_copies: int = SLICE_COPIES,
        max_pushes: int = MAX_PUSHES,
    ) -> None:
        self._runtime = runtime
        self._own = own
        self._device = device
        self._bell = bell
        self._slice_bytes = slice_bytes
        self._slice_copies = slice_copies
        self._max_pushes = max_pushes
        self._pushes: dict[Hashable, _Push] = {}
        self._lanes: dict[int, _Lane] = {}  # by engine, whatever its incarnation
        self._closed = False

    def push(self, key: Hashable, peer_pool: CudaPool, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """See `Transport`. `peer_pool` stays open until the completion has been told; `pairs` is copied."""
        if key in self._pushes:
            raise ValueError(f"a push with the key {key!r} is in flight")
        push = _Push(key, len(pairs) * block_bytes)
        try:
            runs = self._check(peer_pool, pairs, block_bytes)
        except ValueError as e:
            push.reason = str(e)
        else:
            push.slices = slices(runs, block_bytes, self._slice_bytes, self._slice_copies)
            push.pool = peer_pool
            peer_pool.users += 1
            lane = self._lane(peer_pool.engine)
            lane.turns.appendleft(push)  # before those that have begun: it may be all that a frozen request waits for
            self._advance(lane)
        self._pushes[key] = push
        if push.over:
            doorbell.ring(self._bell)

    def drain(self, key: Hashable) -> bool:
        """See `Transport`."""
        push = self._pushes.get(key)
        if push is None:
            return False
        push.drained = True
        doorbell.ring(self._bell)  # no event may come
        return True

    def completed(self) -> list[Completion]:
        """See `Transport`. Also begins the slices whose turn has come."""
        for lane in self._lanes.values():
            self._advance(lane)
        ended = [push for push in self._pushes.values() if push.over]
        for push in ended:
            del self._pushes[push.key]
            if push.pool is not None:
                push.pool.users -= 1
        return [push.completion() for push in ended]

    def close(self) -> None:
        """See `Transport`. What it has cut off is told by `completed`."""
        self._closed = True
        for push in self._pushes.values():
            push.drained = True
        for lane in self._lanes.values():
            self._runtime.synchronize_stream(lane.stream)
            self._advance(lane)
            lane.close()
        self._lanes.clear()

    def _check(self, pool: Any, pairs: Sequence[tuple[int, int]], block_bytes: int) -> list[Run]:
        """The runs of a push. ValueError says why there can be none."""
        if self._closed:
            raise ValueError("the transport is closed")
        if len(self._pushes) >= self._max_pushes:
            raise ValueError("too many pushes are in flight")
        if not isinstance(pool, CudaPool):
            raise ValueError(f"{pool!r} is not a pool in a GPU's memory")
        if not pool.open:
            raise ValueError(f"incarnation {pool.incarnation} of engine {pool.engine} is over")
        runs = merge(pairs)
        for run in runs:
            check_bounds("source", run.source, run.length, block_bytes, self._own.nbytes)
            check_bounds("destination", run.destination, run.length, block_bytes, pool.nbytes)
        if pool.refusal is None and runs:
            pool.refusal = self._probe(pool, block_bytes)
        if pool.refusal:
            raise ValueError(pool.refusal)
        return runs

    def _lane(self, engine: int) -> _Lane:
        if engine not in self._lanes:
            self._lanes[engine] = _Lane(self._runtime, self._device, self._bell, f"kv-bell-{engine}")
        return self._lanes[engine]

    def _advance(self, lane: _Lane) -> None:
        """Take what has ended, begin whose turn it is."""
        while lane.flying and self._is_over(lane):
            lane.end()
        while lane.turns and len(lane.flying) < SLICES_AHEAD:
            push = lane.turns.popleft()
            if not push.resting:
                self._begin(lane, push)
                lane.turns.append(push)

    def _is_over(self, lane: _Lane) -> bool:
        oldest = lane.flying[0]
        try:
            return self._runtime.is_over(oldest.event)
        except CudaError as e:
            self._recover(lane, oldest.push, e)
            return True

    def _begin(self, lane: _Lane, push: _Push) -> None:
        assert push.pool is not None
        try:
            lane.begin(push, self._own.pointer, push.pool.pointer)
        except CudaError as e:
            self._recover(lane, push, e)

    def _recover(self, lane: _Lane, push: _Push, error: CudaError) -> None:
        """Have `push` fail, with nothing of it on the stream any more. Raises CudaError if the context is lost: then
        this call fails as every other does."""
        push.reason = str(error)
        self._runtime.synchronize_stream(lane.stream)

    def _probe(self, pool: CudaPool, block_bytes: int) -> str:
        """Why nothing can go to `pool`; "" if bytes arrive. That the driver grants access does not say so: behind
        some bridges and IOMMUs copies between devices go astray."""
        lane = self._lane(pool.engine)
        access = f"no peer access between {self._own.device} and {pool.device}"
        size = min(PROBE_BYTES, block_bytes)
        end = block_bytes - size
        try:
            arrived = any(
                self._round_trip(lane, self._own.pointer + end, pool.pointer + end, size) for _ in range(_PROBES)
            )
        except CudaError as e:
            self._runtime.synchronize_stream(lane.stream)
            return f"{access}: {e}"
        return "" if arrived else f"{access}: what is copied there does not arrive"

    def _round_trip(self, lane: _Lane, here: int, there: int, size: int) -> bool:
        """Whether a nonce that goes from the host to `here`, and on to `there`, is found there."""
        nonce = os.urandom(size)
        sent, found = ctypes.create_string_buffer(nonce, size), ctypes.create_string_buffer(size)
        self._runtime.copy(here, ctypes.addressof(sent), size, lane.stream)
        self._runtime.copy(there, here, size, lane.stream)
        self._runtime.copy(ctypes.addressof(found), there, size, lane.stream)
        self._runtime.synchronize_stream(lane.stream)
        return found.raw == nonce
