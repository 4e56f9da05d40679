"""What an engine tells of its moves: an event each, and the figures."""

from __future__ import annotations

import pytest

from daemon.control.eventlog import SLOT_BYTES, EventLog, EventReader
from daemon.control.events import EngineChanged, HandedBack, MoveEnded, Preempted
from daemon.control.messages import EngineState, MigrateTo, RequestParams, SamplingParams
from daemon.control.rebalance import Reason
from daemon.control.stats import ENGINE, MOVE_REASONS, MOVE_RESULTS, StatsPage, snapshot
from daemon.engine.llumlet import Report, Result
from daemon.engine.logbook import Logbook
from daemon.engine.request import Request


class Desk:
    """A logbook, and what is in it."""

    def __init__(self) -> None:
        log, self.page = memoryview(bytearray(8 * SLOT_BYTES)), memoryview(bytearray(ENGINE.nbytes))
        self._reader = EventReader(log)
        self.logbook = Logbook(EventLog(log), StatsPage(self.page, ENGINE), block_bytes=100)

    @property
    def events(self) -> list:
        return [entry.event for entry in self._reader.read()[0]]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def request(label: str = "cmpl-1-0") -> Request:
    return Request(255, 1, 0, RequestParams(SamplingParams(1, 0), 0.0, label=label), [1, 2, 3], 3)


def test_a_move(desk: Desk):
    report = Report(request(), 1, "memory", Result.MOVED, "", 2, 7, 3, 0.5, 0.25)
    desk.logbook.move(report)
    assert desk.events == [MoveEnded(255, "cmpl-1-0", 1, "memory", "moved", "", 2, 7, 3, 700, 0.5, 0.25)]
    seen = snapshot(desk.page, ENGINE)
    assert seen.counter("migrations", "memory", "moved") == 1
    sums = {"stages": 2, "blocks": 7, "seconds": 0.5, "frozen_seconds": 0.25}
    for name, value in sums.items():
        found = seen.histogram(f"migration_{name}")
        assert (found.sum, sum(found.counts)) == (value, 1)


@pytest.mark.parametrize("result", [r for r in Result if r is not Result.MOVED])
def test_the_sizes_of_moves_are_those_of_moves_that_went_well(desk: Desk, result: Result):
    desk.logbook.move(Report(request(), 1, "operator", result, "why", 1, 1, 1, 1.0, 1.0))
    seen = snapshot(desk.page, ENGINE)
    assert seen.counter("migrations", "operator", result) == 1
    assert sum(seen.histogram("migration_stages").counts) == 0


def test_other_events(desk: Desk):
    desk.logbook.move(Report(request(""), -1, "draining", Result.HANDED_BACK, "it waited"))
    desk.logbook.preempted([request()])
    for state in (EngineState.SERVING, EngineState.SERVING, EngineState.DRAINING):
        desk.logbook.state(state)
    assert desk.events == [
        HandedBack(255, "ff", "draining", "it waited"),
        Preempted(255, "cmpl-1-0", 3),
        EngineChanged("serving"),
        EngineChanged("draining"),
    ]


def test_every_reason_and_result_has_a_series():
    assert set(MOVE_RESULTS) == {*Result}
    assert set(MOVE_REASONS) == {*Reason, MigrateTo(0, 0.0).reason}
