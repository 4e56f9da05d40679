"""Copies of KV blocks from this engine's pool into other pools in shared memory, while the engine computes.

The copying thread competes with the step for cores, memory bandwidth and the interpreter lock. So it copies one slice
at a time, rests between slices and has a lower priority. The caller itself copies what fits in one slice, such as the
tail of a frozen request: that takes a fraction of the time in which a thread wakes up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from daemon.ipc import doorbell
from daemon.ipc.fabric import Fabric
from daemon.kvpool.host_pools import HostPools
from daemon.kvpool.link import KvLink
from daemon.kvpool.transport import MAX_PUSHES, Completion, Outcome, check_bounds, merge

# With these values a copy slows the concurrent steps by about a tenth, on a core of its own or on theirs, and moves
# 1 to 3 GB/s. Without rest and at equal priority it moves twice that and slows the steps by half.
SLICE_BYTES = 1 << 20
REST = 3.0  # seconds of rest for each second of copying
NICENESS = 10  # above the engine's own; on a shared core nine tenths of the time go to the step
MIN_COPY_COST = 16 << 10  # bytes: a smaller copy takes as long as one of this size, for its bookkeeping


def connect(fabric: Fabric, pool: memoryview, num_blocks: int, supervisor_pid: int) -> KvLink:
    """Connect this engine's pool, a shared-memory segment, with its peers' pools."""
    _, own = fabric.topology.role(fabric.process)
    pools = HostPools(fabric.table(), fabric.topology, supervisor_pid, fabric.bell, own)
    return KvLink(num_blocks, pools, HostTransport(pool, fabric.bell))


def copy(
    source: memoryview, destination: memoryview, pairs: Sequence[tuple[int, int]], block_bytes: int, slice_bytes: int
) -> Iterator[int]:
    """Copy the blocks of `pairs`; yield the number of bytes after about every `slice_bytes` and at the end.

    Raises ValueError, before the first byte, for blocks outside the pools or a pool that is read-only.
    """
    here, there = _bytes(source), _bytes(destination)
    if not there.flags.writeable:
        raise ValueError("the peer's pool is mapped read-only")
    runs = merge(pairs)
    for run in runs:
        check_bounds("source", run.source, run.length, block_bytes, len(here))
        check_bounds("destination", run.destination, run.length, block_bytes, len(there))
    budget, copied = slice_bytes, 0
    for run in runs:
        at, shift = run.source * block_bytes, (run.destination - run.source) * block_bytes
        end = at + run.length * block_bytes
        while at < end:
            stop = min(end, at + budget)
            np.copyto(there[at + shift : stop + shift], here[at:stop])  # releases the interpreter lock
            budget -= max(stop - at, MIN_COPY_COST)
            copied += stop - at
            at = stop
            if budget <= 0:
                yield copied
                budget, copied = slice_bytes, 0
    yield copied


def _bytes(pool: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(pool, np.uint8)


def _lower_priority() -> None:
    """Lower the priority of the calling thread only: the kernel takes a thread id to mean that one thread."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, ours + NICENESS))


class _Push:
    """One push in flight. The engine's loop changes no field except `cancelled`."""

    __slots__ = ("cancelled", "copied", "key", "nbytes", "slices", "started")

    def __init__(self, key: Hashable, slices: Iterator[int], nbytes: int) -> None:
        self.key = key
        self.slices = slices
        self.nbytes = nbytes
        self.copied = 0
        self.cancelled = False
        self.started = time.monotonic()

    def advance(self) -> Completion | None:
        """Copy the next slice; return the completion after the last one."""
        if self.cancelled:
            return self.completion(Outcome.CANCELLED)
        try:
            self.copied += next(self.slices)
        except Exception as e:  # of any kind: the migration fails, the engine continues
            return self.completion(Outcome.FAILED, str(e) or repr(e))
        return self.completion(Outcome.DONE) if self.copied == self.nbytes else None

    def completion(self, outcome: Outcome, reason: str = "") -> Completion:
        return Completion(self.key, self.copied, time.monotonic() - self.started, outcome, reason)


class HostTransport:
    """The `Transport` between pools in shared memory: one thread copies the pushes in turn, slice by slice.

    A push of at most one slice has ended when `push` returns.

    `pool`: this engine's own; `bell`: this engine's doorbell; `rest`: seconds of rest for each second of copying.
    """

    def __init__(
        self,
        pool: memoryview,
        bell: int,
        *,
        slice_bytes: int = SLICE_BYTES,
        rest: float = REST,
        max_pushes: int = MAX_PUSHES,
    ) -> None:
        self._pool = pool
        self._bell = bell
        self._slice_bytes = slice_bytes
        self._rest = rest
        self._max_pushes = max_pushes
        self._pushes: dict[Hashable, _Push | None] = {}  # None: ended, but `completed` has not returned it yet
        self._queue: deque[_Push] = deque()
        self._ended: list[Completion] = []
        self._rest_until = 0.0  # monotonic seconds
        self._closing = False
        self._changed = threading.Condition(threading.Lock())
        self._thread = threading.Thread(target=self._run, name="kv-copy", daemon=True)
        self._thread.start()

    def push(self, key: Hashable, peer_pool: memoryview, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """See `Transport`. `peer_pool` is referenced until the completion; `pairs` is copied."""
        slices = copy(self._pool, peer_pool, list(pairs), block_bytes, self._slice_bytes)
        push = _Push(key, slices, len(pairs) * block_bytes)
        with self._changed:
            if key in self._pushes:
                raise ValueError(f"a push with the key {key!r} is in flight")
            reason = self._refusal()
            self._pushes[key] = push
        completion = None
        if reason:
            completion = push.completion(Outcome.FAILED, reason)
        elif push.nbytes <= self._slice_bytes:  # done before the thread could wake up
            completion = push.advance()
        self._settle(push, completion)

    def cancel(self, key: Hashable) -> bool:
        """See `Transport`."""
        with self._changed:
            push = self._pushes.get(key)
            if push is not None:
                push.cancelled = True
            return key in self._pushes

    def completed(self) -> list[Completion]:
        """See `Transport`."""
        with self._changed:
            ended, self._ended = self._ended, []
            for completion in ended:
                del self._pushes[completion.key]
            return ended

    def close(self) -> None:
        """See `Transport`. `completed` returns the pushes that this call cancels."""
        with self._changed:
            self._closing = True
            for push in self._pushes.values():
                if push is not None:
                    push.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _refusal(self) -> str:
        if self._closing:
            return "the transport is closed"
        return "too many pushes are in flight" if len(self._pushes) >= self._max_pushes else ""

    def _settle(self, push: _Push, completion: Completion | None) -> None:
        """Queue `push` for its next slice if `completion` is None, otherwise report its end."""
        with self._changed:
            if completion is None:
                self._queue.append(push)
                self._changed.notify()
                return
            self._pushes[push.key] = None
            self._ended.append(completion)
        doorbell.ring(self._bell)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        _lower_priority()
        while self._copy_next_slice():  # a call each: between slices no local variable keeps a peer's pool mapped
            pass

    def _copy_next_slice(self) -> bool:
        """Copy one slice of the next push in the queue; return False if the transport closes and none is left."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return False
                self._changed.wait()
            push = self._queue.popleft()
        self._pause()
        before = time.thread_time()
        completion = push.advance()
        self._rest_until = time.monotonic() + self._rest * (time.thread_time() - before)
        self._settle(push, completion)
        return True

    def _pause(self) -> None:
        seconds = self._rest_until - time.monotonic()
        if seconds > 0 and not self._closing:
            time.sleep(seconds)
