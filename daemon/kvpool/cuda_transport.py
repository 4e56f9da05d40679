"""Copies of KV blocks from this engine's pool into other GPUs' pools.

A copy reads only KV of steps that are already collected: the scheduler counts no other. A peer gives a source only
blocks that no step in flight on the peer writes (`Scheduler.allocate_settled`). So no copy has to wait for the
compute stream of either side.

**A peer that dies during a copy** may take the memory with it. The driver then lets the copy finish, fails it, or
declares this process's context lost, after which every call fails. The first two lead to a completion. The last
raises a CudaError out of `CudaTransport`: the engine must exit so that the supervisor restarts it. To make this rare,
no new copy goes to a pool once its engine is known to be dead, and the pool is closed after the last copy into it has
ended.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from daemon.ipc import doorbell
from daemon.ipc.fabric import Fabric
from daemon.kvpool.cuda_pools import CudaPool, CudaPools, OwnPool, export
from daemon.kvpool.cudart import Copy, CudaError, CudaRuntime
from daemon.kvpool.link import KvLink
from daemon.kvpool.transport import MAX_PUSHES, Completion, Outcome, Run, check_bounds, merge

log = logging.getLogger(__name__)

# A slice takes less than a millisecond over NVLink and a few milliseconds over PCIe. `cancel` waits for that long,
# and so does a small push behind a large one. With two slices in flight the copy engine does not wait for the
# engine's loop, which adds slices once a step.
SLICE_BYTES = 256 << 20
SLICE_COPIES = 512  # each costs the loop about 2 us
MAX_SLICES_IN_FLIGHT = 2  # per peer


def connect(fabric: Fabric, memory: Any, num_blocks: int, runtime: CudaRuntime | None = None) -> KvLink:
    """Connect this engine's pool with its peers' pools. `memory`: the pool, a tensor uint8[nbytes] on its GPU.

    Call it after the capture of CUDA graphs, from the thread that will use the result. Raises OSError without a CUDA
    runtime, CudaError if the device fails.
    """
    runtime = runtime or CudaRuntime()
    device: int = memory.device.index
    runtime.set_device(device)
    own = OwnPool(memory.data_ptr(), memory.numel(), runtime.pci_address(device))
    boards = {i: fabric.board_of(fabric.topology.engine(i)) for i in range(fabric.topology.engines)}
    _, index = fabric.topology.role(fabric.process)
    pools = CudaPools(
        runtime,
        fabric.table(),
        fabric.topology,
        boards,
        memory=own,
        block_bytes=own.nbytes // num_blocks,
        device=device,
        bell=fabric.bell,
        own=index,
    )
    return KvLink(num_blocks, pools, CudaTransport(runtime, own, device, fabric.bell), export(runtime, own))


class CopyRange(NamedTuple):
    """One copy: byte offsets in the source pool and in the destination pool."""

    source: int
    destination: int
    nbytes: int


def split_into_slices(
    runs: Sequence[Run], block_bytes: int, slice_bytes: int, slice_copies: int
) -> Iterator[list[CopyRange]]:
    """Yield the copies of `runs` in slices of at most `slice_copies` copies and `slice_bytes` bytes."""
    copies: list[CopyRange] = []
    room = slice_bytes
    for run in runs:
        at, left = 0, run.length * block_bytes
        while left:
            nbytes = min(left, room)
            copies.append(CopyRange(run.source * block_bytes + at, run.destination * block_bytes + at, nbytes))
            at, left, room = at + nbytes, left - nbytes, room - nbytes
            if not room or len(copies) == slice_copies:
                yield copies
                copies, room = [], slice_bytes
    if copies:
        yield copies


@dataclass(slots=True, eq=False)
class _Push:
    """One push, from the call of `push` until `completed` returns its end."""

    key: Hashable
    nbytes: int
    pool: CudaPool | None = None  # None: refused before anything was done
    slices: Iterator[list[CopyRange]] = iter(())
    issued: int = 0  # bytes
    copied: int = 0  # bytes
    slices_in_flight: int = 0
    cancelled: bool = False
    reason: str = ""  # of its failure
    started: float = field(default_factory=time.monotonic)

    @property
    def all_issued(self) -> bool:
        """True if no further slice of it will start."""
        return self.cancelled or bool(self.reason) or self.issued == self.nbytes

    @property
    def ended(self) -> bool:
        return self.all_issued and not self.slices_in_flight

    def completion(self) -> Completion:
        outcome = Outcome.DONE if self.copied == self.nbytes else Outcome.CANCELLED
        if self.reason:
            outcome = Outcome.FAILED
        return Completion(self.key, self.copied, time.monotonic() - self.started, outcome, self.reason)


@dataclass(slots=True, eq=False)
class _Slice:
    """A slice in flight. The stream's thread sets `released`: from then on it does not use the event."""

    push: _Push
    nbytes: int
    event: int
    released: bool = False


class _PeerStream:
    """The CUDA stream to one peer, the slices on it and the queue of pushes that wait for it.

    A GPU cannot ring a doorbell, so a thread waits for each event and rings. (A function that the stream calls would
    hold up the stream while it waits for the interpreter lock, and CUDA does not call it after an error.) There is
    one thread per stream because the events of one stream complete in order and those of two streams do not.
    """

    def __init__(self, runtime: CudaRuntime, device: int, bell: int, name: str) -> None:
        self._runtime = runtime
        self._device = device
        self._bell = bell
        self.stream = runtime.create_stream()
        self.in_flight: deque[_Slice] = deque()
        self.queue: deque[_Push] = deque()  # each gets one slice per turn
        self._done: deque[_Slice] = deque()  # their events are reused
        self._watched: queue.SimpleQueue[_Slice | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._thread.start()

    def issue(self, push: _Push, source: int, destination: int) -> None:
        """Put the next slice of `push` on the stream; `source`, `destination`: addresses of the two pools.

        After a CudaError some of the slice's copies may be on the stream, with no event behind them.
        """
        copies = next(push.slices)
        self._runtime.copy_all(
            [Copy(destination + copy.destination, source + copy.source, copy.nbytes) for copy in copies], self.stream
        )
        event = self._new_event()
        self._runtime.record(event, self.stream)
        issued = _Slice(push, sum(copy.nbytes for copy in copies), event)
        push.issued += issued.nbytes
        push.slices_in_flight += 1
        self.in_flight.append(issued)
        self._watched.put(issued)

    def retire_oldest(self) -> None:
        """Account for the oldest slice, which has ended."""
        ended = self.in_flight.popleft()
        ended.push.slices_in_flight -= 1
        if not ended.push.reason:
            ended.push.copied += ended.nbytes
        self._done.append(ended)

    def close(self) -> None:
        """End the thread and destroy stream and events. The stream must be empty."""
        self._watched.put(None)
        self._thread.join()
        for done in self._done:
            self._runtime.destroy_event(done.event)
        self._runtime.destroy_stream(self.stream)

    def _new_event(self) -> int:
        if self._done and self._done[0].released:
            return self._done.popleft().event
        return self._runtime.create_event()

    def _watch(self) -> None:
        try:
            self._runtime.set_device(self._device)
        except CudaError as e:  # the loop polls at each step anyway
            log.error("the thread that reports finished KV copies cannot use its device: %s", e)
        while (watched := self._watched.get()) is not None:
            try:
                self._runtime.synchronize_event(watched.event)
            except CudaError as e:
                log.error("a copy of KV blocks failed: %s", e)  # the loop sees the error when it polls the event
            watched.released = True
            doorbell.ring(self._bell)


class CudaTransport:
    """The `Transport` between pools in the memory of GPUs: copies on one low-priority stream per peer.

    The engine's loop issues the copies slice by slice and polls for their end; threads only wake it. So a call takes
    the time to issue a slice, not to copy it. `push`, `completed` and `close` raise CudaError if the device has
    failed and the engine must exit.

    `own`: this engine's pool, on `device` (this process's device number); `bell`: this engine's doorbell.
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
        self._streams: dict[int, _PeerStream] = {}  # by engine; a new incarnation uses the same stream
        self._closed = False

    def push(self, key: Hashable, peer_pool: CudaPool, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """See `Transport`. `peer_pool` stays open until `completed` has returned the end; `pairs` is copied."""
        if key in self._pushes:
            raise ValueError(f"a push with the key {key!r} is in flight")
        push = _Push(key, len(pairs) * block_bytes)
        try:
            runs = self._check(peer_pool, pairs, block_bytes)
        except ValueError as e:
            push.reason = str(e)
        else:
            push.slices = split_into_slices(runs, block_bytes, self._slice_bytes, self._slice_copies)
            push.pool = peer_pool
            peer_pool.users += 1
            stream = self._stream(peer_pool.engine)
            stream.queue.appendleft(push)  # ahead of pushes in progress: a frozen request may wait for just this one
            self._advance(stream)
        self._pushes[key] = push
        if push.ended:
            doorbell.ring(self._bell)

    def cancel(self, key: Hashable) -> bool:
        """See `Transport`."""
        push = self._pushes.get(key)
        if push is None:
            return False
        push.cancelled = True
        doorbell.ring(self._bell)  # the push may have no event that would ring
        return True

    def completed(self) -> list[Completion]:
        """See `Transport`. Also issues the next slices."""
        for stream in self._streams.values():
            self._advance(stream)
        ended = [push for push in self._pushes.values() if push.ended]
        for push in ended:
            del self._pushes[push.key]
            if push.pool is not None:
                push.pool.users -= 1
        return [push.completion() for push in ended]

    def close(self) -> None:
        """See `Transport`. `completed` returns the pushes that this call cancels."""
        self._closed = True
        for push in self._pushes.values():
            push.cancelled = True
        for stream in self._streams.values():
            self._runtime.synchronize_stream(stream.stream)
            self._advance(stream)
            stream.close()
        self._streams.clear()

    def _check(self, pool: Any, pairs: Sequence[tuple[int, int]], block_bytes: int) -> list[Run]:
        """Return the runs of a push; raise ValueError with the reason if the push is impossible."""
        if self._closed:
            raise ValueError("the transport is closed")
        if len(self._pushes) >= self._max_pushes:
            raise ValueError("too many pushes are in flight")
        if not isinstance(pool, CudaPool):
            raise ValueError(f"{pool!r} is not a pool in a GPU's memory")
        if not pool.open:
            raise ValueError(f"incarnation {pool.incarnation} of engine {pool.engine} is dead")
        runs = merge(pairs)
        for run in runs:
            check_bounds("source", run.source, run.length, block_bytes, self._own.nbytes)
            check_bounds("destination", run.destination, run.length, block_bytes, pool.nbytes)
        return runs

    def _stream(self, engine: int) -> _PeerStream:
        if engine not in self._streams:
            self._streams[engine] = _PeerStream(self._runtime, self._device, self._bell, f"kv-bell-{engine}")
        return self._streams[engine]

    def _advance(self, stream: _PeerStream) -> None:
        """Retire the slices that have ended and issue new ones, one push after another."""
        while stream.in_flight and self._oldest_ended(stream):
            stream.retire_oldest()
        while stream.queue and len(stream.in_flight) < MAX_SLICES_IN_FLIGHT:
            push = stream.queue.popleft()
            if not push.all_issued:
                self._issue(stream, push)
                stream.queue.append(push)

    def _oldest_ended(self, stream: _PeerStream) -> bool:
        oldest = stream.in_flight[0]
        try:
            return self._runtime.is_done(oldest.event)
        except CudaError as e:
            self._fail(stream, oldest.push, e)
            return True

    def _issue(self, stream: _PeerStream, push: _Push) -> None:
        assert push.pool is not None
        try:
            stream.issue(push, self._own.pointer, push.pool.pointer)
        except CudaError as e:
            self._fail(stream, push, e)

    def _fail(self, stream: _PeerStream, push: _Push, error: CudaError) -> None:
        """Mark `push` as failed and wait until the stream is empty.

        Raises CudaError if the context is lost: then this wait fails like every other call.
        """
        push.reason = str(error)
        self._runtime.synchronize_stream(stream.stream)
