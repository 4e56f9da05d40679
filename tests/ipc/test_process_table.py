"""The process table and progress words."""

from __future__ import annotations

import time
from typing import Any

import pytest

from daemon.ipc.board import BOARD_BYTES
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
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget


def table(n: int = 3) -> tuple[memoryview, list[memoryview]]:
    return memoryview(bytearray(8)), [memoryview(bytearray(BOARD_BYTES)) for _ in range(n)]


def test_refresh_returns_true_only_after_a_change():
    generation, boards = table()
    writer, reader = TableWriter(generation, boards), TableReader(generation, boards)
    assert reader.refresh()  # the first refresh reads every row
    assert not reader.refresh()
    assert reader.rows == [ProcessFacts()] * 3
    up = ProcessFacts(ProcessState.UP, 4, pid=99, started_at=1.25, restarts=3, last_exit="killed by signal 9")
    writer.publish(1, up)
    writer.publish(2, ProcessFacts(ProcessState.DEAD, 1))
    assert reader.refresh()
    assert reader.rows == [ProcessFacts(), up, ProcessFacts(ProcessState.DEAD, 1)]
    assert not reader.refresh()
    assert TableReader(generation, boards).refresh()  # a new reader reads every row


def test_a_change_during_a_refresh_is_read_by_the_next_one():
    generation, boards = table()
    writer, reader = TableWriter(generation, boards), TableReader(generation, boards)
    reader.refresh()
    first, second = (ProcessFacts(ProcessState.UP, n) for n in (1, 2))
    writer.publish(2, first)

    class ChangingBoard(type(reader._boards[0])):
        def read(self):
            found = super().read()
            if not later.rows[0].state:
                writer.publish(0, second)  # after row 0 has been read
            return found

    later = reader
    reader._boards[0] = ChangingBoard(boards[0])
    assert reader.refresh()
    assert reader.rows[0] == ProcessFacts()
    assert reader.refresh()
    assert reader.rows[0] == second


@pytest.mark.parametrize("stores", range(5))
def test_a_row_is_complete_before_its_generation_changes(stores: int):
    """A reader that reads the new generation reads the new row, at whichever store the writer crashed."""
    generation, boards = table(1)
    budget = StoreBudget(stores)
    memory: list[Any] = [CrashingMemory(view, budget) for view in (generation, boards[0])]
    writer = TableWriter(memory[0], memory[1:])
    reader = TableReader(generation, boards)
    reader.refresh()
    try:
        writer.publish(0, ProcessFacts(ProcessState.UP, 7))
    except Crash:
        assert stores < 4
    assert reader.refresh() == (stores >= 4)
    assert reader.rows[0].incarnation == (7 if stores >= 4 else 0)


def test_progress_words():
    progress = Progress(memoryview(bytearray(PROGRESS_BYTES)))
    now = time.monotonic()
    assert progress.overdue(now) < 0  # there is no deadline yet
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
    names = {engine_state(process, state) for process in ProcessState for state in EngineState}
    assert names == set(ENGINE_STATES)
    assert engine_state(ProcessState.UP, EngineState.PARKED) == "parking"
    assert engine_state(ProcessState.PARKED, EngineState.PARKED) == "parked"
    assert engine_state(ProcessState.DEAD, EngineState.SERVING) == "dead"
