from __future__ import annotations

import time

import pytest

from daemon.ipc.board import SLOT_BYTES
from daemon.ipc.messages import EngineState
from daemon.ipc.process_table import (
    ENGINE_STATES,
    PROGRESS_BYTES,
    ProcessFacts,
    ProcessState,
    Progress,
    TableReader,
    TableWriter,
    engine_state,
)
from tests.ipc.crashing_memory import Died, Mortal
from tests.ipc.crashing_memory import Life as Stores


def table(n: int = 3) -> tuple[memoryview, list[memoryview]]:
    return memoryview(bytearray(8)), [memoryview(bytearray(SLOT_BYTES)) for _ in range(n)]


def test_refresh_tells_whether_anything_changed():
    generation, slots = table()
    writer, reader = TableWriter(generation, slots), TableReader(generation, slots)
    assert reader.refresh()  # the first look is news
    assert not reader.refresh()
    assert reader.rows == [ProcessFacts()] * 3
    up = ProcessFacts(ProcessState.UP, 4, pid=99, started_at=1.25, restarts=3, last_exit="killed by signal 9")
    writer.publish(1, up)
    writer.publish(2, ProcessFacts(ProcessState.DEAD, 1))
    assert reader.refresh()
    assert reader.rows == [ProcessFacts(), up, ProcessFacts(ProcessState.DEAD, 1)]
    assert not reader.refresh()
    assert TableReader(generation, slots).refresh()  # a late-comer sees it all


def test_a_change_during_a_refresh_is_seen_by_the_next():
    generation, slots = table()
    writer, reader = TableWriter(generation, slots), TableReader(generation, slots)
    reader.refresh()
    first, second = (ProcessFacts(ProcessState.UP, n) for n in (1, 2))
    writer.publish(2, first)

    class Meanwhile(type(reader._slots[0])):
        def read(self):
            found = super().read()
            if not later.rows[0].state:
                writer.publish(0, second)  # after row 0 has been read
            return found

    later = reader
    reader._slots[0] = Meanwhile(slots[0])
    assert reader.refresh()
    assert reader.rows[0] == ProcessFacts()
    assert reader.refresh()
    assert reader.rows[0] == second


@pytest.mark.parametrize("stores", range(5))
def test_a_row_is_there_before_its_generation(stores: int):
    """Who sees the new generation sees the new row, wherever the writer stopped."""
    generation, slots = table(1)
    life = Stores(stores)
    writer = TableWriter(Mortal(generation, life), [Mortal(slots[0], life)])
    reader = TableReader(generation, slots)
    reader.refresh()
    try:
        writer.publish(0, ProcessFacts(ProcessState.UP, 7))
    except Died:
        assert stores < 4
    assert reader.refresh() == (stores >= 4)
    assert reader.rows[0].incarnation == (7 if stores >= 4 else 0)


def test_progress_words():
    progress = Progress(memoryview(bytearray(PROGRESS_BYTES)))
    now = time.monotonic()
    assert progress.overdue(now) < 0  # nothing was promised
    progress.enter(EngineState.LOADING, 12, within=50)
    assert (progress.state, progress.incarnation, progress.steps) == (EngineState.LOADING, 12, 0)
    assert -60 < progress.overdue(now) <= -50
    progress.beat(within=5)
    progress.beat(within=5)
    assert progress.steps == 2
    assert progress.overdue(now + 100) == pytest.approx(95, abs=5)
    progress.enter(EngineState.SERVING, 13, within=1)
    assert (progress.state, progress.incarnation) == (EngineState.SERVING, 13)


def test_every_state_of_an_engine_has_a_name():
    names = {engine_state(life, state) for life in ProcessState for state in EngineState}
    assert names == set(ENGINE_STATES)
    assert engine_state(ProcessState.UP, EngineState.PARKED) == "parking"
    assert engine_state(ProcessState.PARKED, EngineState.PARKED) == "parked"
    assert engine_state(ProcessState.DEAD, EngineState.SERVING) == "dead"
