"""What an engine tells of its moves: an event each, and the figures."""

from __future__ import annotations

import pytest

from daemon.engine.migration.llumlet import Report
from daemon.engine.request import Request
from daemon.engine.telemetry import Telemetry
from daemon.enums import MigrationReason, MigrationResult
from daemon.ipc.event_ring import SLOT_BYTES, EventReader, EventWriter
from daemon.ipc.events import EngineChanged, HandedBack, MoveEnded, Preempted
from daemon.ipc.messages import EngineState, MigrateTo, RequestParams, SamplingParams
from daemon.ipc.metrics_page import ENGINE, MOVE_REASONS, MOVE_RESULTS, MetricsPage, snapshot


class Desk:
    """A logbook, and what is in it."""

    def __init__(self) -> None:
        log, self.page = memoryview(bytearray(8 * SLOT_BYTES)), memoryview(bytearray(ENGINE.nbytes))
        self._reader = EventReader(log)
        self.telemetry = Telemetry(EventWriter(log), MetricsPage(self.page, ENGINE), block_bytes=100)

    @property
    def events(self) -> list:
        return [entry.event for entry in self._reader.read()[0]]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def request(label: str = "cmpl-1-0") -> Request:
    return Request(255, 1, 0, RequestParams(SamplingParams(1, 0), 0.0, label=label), [1, 2, 3], 3)


def test_a_move(desk: Desk):
    report = Report(request(), 1, "memory", MigrationResult.MOVED, "", 2, 7, 3, 0.5, 0.25)
    desk.telemetry.move(report)
    assert desk.events == [MoveEnded(255, "cmpl-1-0", 1, "memory", "moved", "", 2, 7, 3, 700, 0.5, 0.25)]
    seen = snapshot(desk.page, ENGINE)
    assert seen.counter("migrations", "memory", "moved") == 1
    sums = {"stages": 2, "blocks": 7, "seconds": 0.5, "frozen_seconds": 0.25}
    for name, value in sums.items():
        found = seen.histogram(f"migration_{name}")
        assert (found.sum, sum(found.counts)) == (value, 1)


@pytest.mark.parametrize("result", [r for r in MigrationResult if r is not MigrationResult.MOVED])
def test_the_sizes_of_moves_are_those_of_moves_that_went_well(desk: Desk, result: MigrationResult):
    desk.telemetry.move(Report(request(), 1, "operator", result, "why", 1, 1, 1, 1.0, 1.0))
    seen = snapshot(desk.page, ENGINE)
    assert seen.counter("migrations", "operator", result) == 1
    assert sum(seen.histogram("migration_stages").counts) == 0


def test_other_events(desk: Desk):
    desk.telemetry.move(Report(request(""), -1, "draining", MigrationResult.HANDED_BACK, "it waited"))
    desk.telemetry.preempted([request()])
    for state in (EngineState.SERVING, EngineState.SERVING, EngineState.DRAINING):
        desk.telemetry.state(state)
    assert desk.events == [
        HandedBack(255, "ff", "draining", "it waited"),
        Preempted(255, "cmpl-1-0", 3),
        EngineChanged("serving"),
        EngineChanged("draining"),
    ]


def test_every_reason_and_result_has_a_series():
    assert set(MOVE_RESULTS) == {*MigrationResult}
    assert set(MOVE_REASONS) == {*MigrationReason, MigrateTo(0, 0.0).reason}
