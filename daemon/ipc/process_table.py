"""Who is alive: the process table (the supervisor writes, all read) and progress words (each its own).

The table has one board slot a process and one *generation* word, raised after each change, so that a
reader learns with one load whether anything changed. Progress is four fixed words, with the wish words the only
shared data that the supervisor reads: silence past the deadline is suspicion, death comes from the kernel.
"""

from __future__ import annotations

import time
from enum import IntEnum

import msgspec

from daemon.ipc.board import BoardReader, BoardWriter
from daemon.ipc.messages import EngineState

PROGRESS_BYTES = 64


class ProcessState(IntEnum):
    """What the supervisor knows of a process."""

    ABSENT = 0  # not started yet
    UP = 1
    DEAD = 2  # died; a successor comes after a back-off
    FAILED = 3  # will not be started again
    STOPPED = 4  # ended on request
    PARKED = 5  # engines: asleep, that is ended with nothing left to do, until the coordinator wishes it back


# What operators call the state of an engine: see `engine_state`.
ENGINE_STATES = (
    *("absent", "starting", "loading", "serving", "draining", "parking", "parked"),
    *("dead", "failed", "stopped"),
)


def engine_state(life: int, published: EngineState) -> str:
    """One of ENGINE_STATES. An engine that publishes PARKED is only on its way: parked is who has gone."""
    if life != ProcessState.UP:
        return ProcessState(life).name.lower()
    return "parking" if published == EngineState.PARKED else published.name.lower()


class ProcessFacts(msgspec.Struct, array_like=True, frozen=True):
    """One row of the table."""

    state: int = ProcessState.ABSENT
    incarnation: int = 0
    pid: int = 0
    started_at: float = 0.0  # CLOCK_MONOTONIC seconds
    restarts: int = 0
    last_exit: str = ""  # how the predecessor ended
    pool_fd: int = -1  # engines: the supervisor's descriptor of the KV pool of this incarnation
    pool_bytes: int = 0  # engines: size of that pool
    last_crashed: int = (
        0  # last incarnation that did not end empty: a later one that is over took nobody's work with it
    )


_decode = msgspec.msgpack.Decoder(ProcessFacts).decode
_encode = msgspec.msgpack.Encoder().encode


class TableWriter:
    """The supervisor's hand on the table."""

    def __init__(self, generation: memoryview, slots: list[memoryview]) -> None:
        self._generation = generation.cast("Q")
        self._slots = [BoardWriter(s) for s in slots]

    def publish(self, process: int, facts: ProcessFacts) -> None:
        self._slots[process].publish(_encode(facts))
        self._generation[0] += 1


class TableReader:
    """A reader of the table; `refresh` is one load when nothing changed."""

    def __init__(self, generation: memoryview, slots: list[memoryview]) -> None:
        self._generation = generation.cast("Q")
        self._slots = [BoardReader(s) for s in slots]
        self._seen = -1
        self.rows = [ProcessFacts() for _ in slots]

    def refresh(self) -> bool:
        """Bring `rows` up to date; True if anything changed."""
        generation = self._generation[0]
        if generation == self._seen:
            return False
        # Generation first, rows after: a change in between raises it again and is read next time.
        self._seen = generation
        for i, slot in enumerate(self._slots):
            found = slot.read()
            if found is not None:
                self.rows[i] = _decode(found[1])
        return True


class Progress:
    """Progress words of one process: incarnation, state, deadline in monotonic ns (0: none), steps."""

    def __init__(self, words: memoryview) -> None:
        self._words = words[:32].cast("Q")

    def enter(self, state: EngineState, incarnation: int, within: float) -> None:
        """Announce a state; the next sign of life is due in `within` seconds."""
        self._words[2] = _due(within)
        self._words[0] = incarnation
        self._words[1] = state

    def beat(self, within: float) -> None:
        """A sign of life; the next one is due in `within` seconds."""
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
        """Seconds past the deadline (negative: still in time)."""
        deadline = self._words[2]
        return now - deadline / 1e9 if deadline else -1.0


def _due(within: float) -> int:
    return time.monotonic_ns() + int(within * 1e9)
