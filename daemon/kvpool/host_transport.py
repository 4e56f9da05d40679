"""Copying KV blocks from this engine's pool into a peer's while the engine goes on computing.

`Transport` is what a migration needs of any backend; `HostTransport` is the one for pools in shared memory. Its
thread competes with the step for cores, memory bandwidth and the interpreter lock, so it copies a slice at a time,
rests in between and has the lower priority. What fits in one slice, such as the tail of a frozen request, the caller
copies itself: that takes a fraction of the time in which a thread wakes up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from daemon.ipc import doorbell

# With these a copy makes the steps beside it about a tenth slower, on a core of its own or on theirs, and moves
# 1 to 3 GB/s; without rest and at equal priority it moves twice that and makes them half as slow again.
SLICE_BYTES = 1 << 20
REST = 3.0  # seconds of rest for each second of copying
NICENESS = 10  # above the engine's own; on a core that both want it leaves nine tenths to the step
PIECE_BYTES = 16 << 10  # a smaller piece takes as long, for its bookkeeping
MAX_PUSHES = 64  # in flight at a time


class Outcome(IntEnum):
    """How a push ended."""

    DONE = 1  # every byte is in the peer's pool
    CANCELLED = 2  # drained before its end
    FAILED = 3  # for a reason


class Completion(NamedTuple):
    """The end of a push: from now on it reads no byte of this pool and writes none of the peer's."""

    key: Hashable
    nbytes: int  # that were copied
    seconds: float  # since `push`, waiting and rests included
    outcome: Outcome = Outcome.DONE
    reason: str = ""


class Transport(Protocol):
    """Copies from the pool of one engine into those of its peers. Called from the engine's loop alone.

    No call but `close` takes longer than the copy of a slice. The source must leave the blocks of a push alone,
    and the destination keep them reserved, until its completion. Pushes share the way evenly and end in any order.
    """

    def push(self, key: Hashable, peer_pool: Any, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """Copy blocks by pairs (block here, block there) into `peer_pool`, in no particular order.

        `peer_pool` is what the backend has mapped of the peer. Whatever is wrong with it or with `pairs`, and a
        queue that is full, end in a failed completion. ValueError if `key` names a push still in flight.
        """
        ...

    def drain(self, key: Hashable) -> bool:
        """Copy no more for `key` than what is on its way. True if its completion is still to come.

        That one may yet say DONE. False means there is no such push: nothing of it is being written.
        """
        ...

    def completed(self) -> list[Completion]:
        """What has ended since the last call, each push exactly once. The engine's bell rings for it."""
        ...

    def close(self) -> None:
        """Drain everything and wait for it: a slice at most."""
        ...


class Run(NamedTuple):
    """`length` adjacent blocks that go to adjacent places."""

    source: int
    destination: int
    length: int


def merge(pairs: Sequence[tuple[int, int]]) -> list[Run]:
    """Runs that cover `pairs` of (source block, destination block), by ascending source: the fewest if no source
    is named twice. ValueError if a destination is: its content would hang on the order.
    """
    if len({destination for _, destination in pairs}) < len(pairs):
        raise ValueError("a block is named twice as a destination")
    runs = []
    source, destination, length = -1, -1, 0
    for pair in sorted(pairs):
        if length and pair == (source + length, destination + length):
            length += 1
            continue
        if length:
            runs.append(Run(source, destination, length))
        (source, destination), length = pair, 1
    return [*runs, Run(source, destination, length)] if length else runs


def copy(
    source: memoryview, destination: memoryview, pairs: Sequence[tuple[int, int]], block_bytes: int, slice_bytes: int
) -> Iterator[int]:
    """Copy the blocks of `pairs`, yielding the number of bytes after about every `slice_bytes` and at the end.

    Raises ValueError, before the first byte, for blocks outside the pools or a pool that cannot be written.
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
            np.copyto(there[at + shift : stop + shift], here[at:stop])  # lets go of the interpreter lock
            budget -= max(stop - at, PIECE_BYTES)
            copied += stop - at
            at = stop
            if budget <= 0:
                yield copied
                budget, copied = slice_bytes, 0
    yield copied


def _bytes(pool: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(pool, np.uint8)


def check_bounds(what: str, block: int, length: int, block_bytes: int, size: int) -> None:
    """ValueError unless the `length` blocks from `block` on lie in a pool of `size` bytes."""
    if block_bytes < 1 or block < 0 or (block + length) * block_bytes > size:
        where = f"{what} blocks {block} to {block + length - 1} of {block_bytes} bytes"
        raise ValueError(f"{where} are not in a pool of {size} bytes")


def _be_nice() -> None:
    """Lower the priority of the calling thread alone, which is what the kernel takes a thread's id to mean."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, ours + NICENESS))


class _Push:
    """One push in flight. `drained` is the only field that the engine's loop changes."""

    __slots__ = ("copied", "drained", "key", "nbytes", "slices", "started")

    def __init__(self, key: Hashable, slices: Iterator[int], nbytes: int) -> None:
        self.key = key
        self.slices = slices
        self.nbytes = nbytes
        self.copied = 0
        self.drained = False
        self.started = time.monotonic()

    def advance(self) -> Completion | None:
        """Copy the next slice; the completion after the last."""
        if self.drained:
            return self.completion(Outcome.CANCELLED)
        try:
            self.copied += next(self.slices)
        except Exception as e:  # of whatever kind: the migration is off, the engine lives on
            return self.completion(Outcome.FAILED, str(e) or repr(e))
        return self.completion(Outcome.DONE) if self.copied == self.nbytes else None

    def completion(self, outcome: Outcome, reason: str = "") -> Completion:
        return Completion(self.key, self.copied, time.monotonic() - self.started, outcome, reason)


class HostTransport:
    """The `Transport` between pools in shared memory: one thread, which takes the pushes in turn slice by slice.

    A push of at most a slice is over when `push` returns.

    `pool`: this engine's own; `bell`: this engine's doorbell. `rest`: seconds of rest for a second of copying.
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
        self._known: dict[Hashable, _Push | None] = {}  # None: ended, and not yet told
        self._turns: deque[_Push] = deque()
        self._ended: list[Completion] = []
        self._tired_until = 0.0  # monotonic seconds
        self._closing = False
        self._changed = threading.Condition(threading.Lock())
        self._thread = threading.Thread(target=self._run, name="kv-mover", daemon=True)
        self._thread.start()

    def push(self, key: Hashable, peer_pool: memoryview, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """See `Transport`. `peer_pool` is held until the completion; `pairs` is copied."""
        slices = copy(self._pool, peer_pool, list(pairs), block_bytes, self._slice_bytes)
        push = _Push(key, slices, len(pairs) * block_bytes)
        with self._changed:
            if key in self._known:
                raise ValueError(f"a push with the key {key!r} is in flight")
            reason = self._refusal()
            self._known[key] = push
        completion = None
        if reason:
            completion = push.completion(Outcome.FAILED, reason)
        elif push.nbytes <= self._slice_bytes:  # sooner done than the thread is awake
            completion = push.advance()
        self._settle(push, completion)

    def drain(self, key: Hashable) -> bool:
        """See `Transport`."""
        with self._changed:
            push = self._known.get(key)
            if push is not None:
                push.drained = True
            return key in self._known

    def completed(self) -> list[Completion]:
        """See `Transport`."""
        with self._changed:
            ended, self._ended = self._ended, []
            for completion in ended:
                del self._known[completion.key]
            return ended

    def close(self) -> None:
        """See `Transport`. What it has cut off is told by `completed`."""
        with self._changed:
            self._closing = True
            for push in self._known.values():
                if push is not None:
                    push.drained = True
            self._changed.notify()
        self._thread.join()

    def _refusal(self) -> str:
        if self._closing:
            return "the transport is closed"
        return "too many pushes are in flight" if len(self._known) >= self._max_pushes else ""

    def _settle(self, push: _Push, completion: Completion | None) -> None:
        """Let `push` wait for its next turn, or tell its end."""
        with self._changed:
            if completion is None:
                self._turns.append(push)
                self._changed.notify()
                return
            self._known[push.key] = None
            self._ended.append(completion)
        doorbell.ring(self._bell)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        _be_nice()
        while self._turn():  # a call each: between turns nothing here keeps a peer's pool mapped
            pass

    def _turn(self) -> bool:
        """One slice of whoever is next; False when closing and nothing is left."""
        with self._changed:
            while not self._turns:
                if self._closing:
                    return False
                self._changed.wait()
            push = self._turns.popleft()
        self._recover()
        before = time.thread_time()
        completion = push.advance()
        self._tired_until = time.monotonic() + self._rest * (time.thread_time() - before)
        self._settle(push, completion)
        return True

    def _recover(self) -> None:
        pause = self._tired_until - time.monotonic()
        if pause > 0 and not self._closing:
            time.sleep(pause)
