"""The process table and the progress words: which processes are alive, and whether they make progress.

Only the supervisor writes the table, and every process reads it. The table has one board per process and one
*generation* word, which grows after each change, so that a reader detects any change with one load. Each process
writes its own progress: four fixed words. Progress words and desired states are the only shared data that the
supervisor reads. A missed deadline makes a process suspect; only the kernel reports a death.
"""

from __future__ import annotations

import time
from enum import IntEnum

import msgspec

from daemon.ipc.board import BoardReader, BoardWriter
from daemon.ipc.messages import EngineState

PROGRESS_BYTES = 64


class ProcessState(IntEnum):
    """State of a process as the supervisor knows it."""

    ABSENT = 0  # not started yet
    UP = 1
    DEAD = 2  # died; the next incarnation starts after a back-off
    FAILED = 3  # will not be restarted
    STOPPED = 4  # ended on request
    PARKED = 5  # engines: its process has ended; starts again when its desired state is SERVING


# The names of an engine's state in status and metrics: see `engine_state`.
ENGINE_STATES = (
    *("absent", "starting", "loading", "serving", "draining", "parking", "parked"),
    *("dead", "failed", "stopped"),
)


def engine_state(state: int, published: EngineState) -> str:
    """Return one of ENGINE_STATES for an engine's ProcessState and the state that it publishes itself.

    An engine that publishes PARKED while its process is up is "parking". It is "parked" when the process has ended.
    """
    if state != ProcessState.UP:
        return ProcessState(state).name.lower()
    return "parking" if published == EngineState.PARKED else published.name.lower()


class ProcessFacts(msgspec.Struct, array_like=True, frozen=True):
    """One row of the table."""

    state: int = ProcessState.ABSENT
    incarnation: int = 0
    pid: int = 0
    started_at: float = 0.0  # CLOCK_MONOTONIC seconds
    restarts: int = 0
    last_exit: str = ""  # how the previous incarnation ended
    pool_fd: int = -1  # engines: the supervisor's descriptor of the KV pool of this incarnation
    pool_bytes: int = 0  # engines: size of that pool, bytes
    last_crashed: int = 0  # last incarnation that crashed; a later one that has ended held no work at its end
    last_failed: int = 0  # last incarnation that ended by an exception of its own: it chose to exit with EXIT_FAILED


_decode = msgspec.msgpack.Decoder(ProcessFacts).decode
_encode = msgspec.msgpack.Encoder().encode


class TableWriter:
    """The only writer of the table, in the supervisor."""

    def __init__(self, generation: memoryview, boards: list[memoryview]) -> None:
        self._generation = generation.cast("Q")
        self._boards = [BoardWriter(b) for b in boards]

    def publish(self, process: int, facts: ProcessFacts) -> None:
        """Replace the row of `process`, then raise the generation."""
        self._boards[process].publish(_encode(facts))
        self._generation[0] += 1


class TableReader:
    """A reader of the table; `refresh` costs one load if nothing changed."""

    def __init__(self, generation: memoryview, boards: list[memoryview]) -> None:
        self._generation = generation.cast("Q")
        self._boards = [BoardReader(b) for b in boards]
        self._seen = -1
        self.rows = [ProcessFacts() for _ in boards]

    def refresh(self) -> bool:
        """Update `rows`; return True if anything has changed."""
        generation = self._generation[0]
        if generation == self._seen:
            return False
        # Read the generation first and the rows after it: a change in between raises it again and is read next time.
        self._seen = generation
        for i, board in enumerate(self._boards):
            found = board.read()
            if found is not None:
                self.rows[i] = _decode(found[1])
        return True


class Progress:
    """Progress words of one process: incarnation, state, deadline in monotonic ns (0: none), number of beats."""

    def __init__(self, words: memoryview) -> None:
        self._words = words[:32].cast("Q")

    def enter(self, state: EngineState, incarnation: int, within: float) -> None:
        """Publish a state; the next beat is due in `within` seconds."""
        self._words[2] = _due(within)
        self._words[0] = incarnation
        self._words[1] = state

    def beat(self, within: float) -> None:
        """Publish progress; the next beat is due in `within` seconds."""
        self._words[3] += 1
        self._words[2] = _due(within)

    @property
    def incarnation(self) -> int:
        return int(self._words[0])

    @property
    def state(self) -> EngineState:
        return EngineState(self._words[1])

    @property
    def steps(self) -> int:
        return int(self._words[3])

    def overdue(self, now: float) -> float:
        """Return the seconds since the deadline (negative: it is still to come or there is none)."""
        deadline = self._words[2]
        return now - deadline / 1e9 if deadline else -1.0


def _due(within: float) -> int:
    return time.monotonic_ns() + int(within * 1e9)
