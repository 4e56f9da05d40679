"""The events and metrics that an engine reports of its moves."""

from __future__ import annotations

import pytest

from daemon.engine.migration.actions import Report
from daemon.engine.request import Request
from daemon.engine.telemetry import Telemetry
from daemon.enums import MigrationReason, MigrationResult
from daemon.ipc.event_ring import ENTRY_BYTES, EventReader, EventWriter
from daemon.ipc.events import EngineChanged, HandedBack, MoveEnded, Preempted
from daemon.ipc.messages import EngineState, MigrateTo, RequestParams, SamplingParams
from daemon.ipc.metrics_page import ENGINE, MOVE_REASONS, MOVE_RESULTS, MetricsPage, snapshot


class Recorder:
    """A `Telemetry` over memory, and the events in it."""

    def __init__(self) -> None:
        log, self.page = memoryview(bytearray(8 * ENTRY_BYTES)), memoryview(bytearray(ENGINE.nbytes))
        self._reader = EventReader(log)
        self.telemetry = Telemetry(EventWriter(log), MetricsPage(self.page, ENGINE), block_bytes=100)

    @property
    def events(self) -> list:
        return [entry.event for entry in self._reader.read()[0]]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def request(label: str = "cmpl-1-0") -> Request:
    return Request(255, 1, 0, RequestParams(SamplingParams(1, 0), 0.0, label=label), [1, 2, 3], 3)


def test_a_move_is_an_event_and_four_histograms(recorder: Recorder):
    report = Report(
        request=request(), to=1, reason="memory", result=MigrationResult.MOVED,
        num_copies=2, blocks=7, skipped=3, seconds=0.5, frozen_seconds=0.25,
    )  # fmt: skip
    recorder.telemetry.move(report)
    assert recorder.events == [
        MoveEnded(
            rid=255, request="cmpl-1-0", to=1, reason="memory", result="moved", detail="",
            stages=2, blocks=7, skipped=3, nbytes=700, seconds=0.5, frozen_seconds=0.25,
        )
    ]  # fmt: skip
    page = snapshot(recorder.page, ENGINE)
    assert page.counter("migrations", "memory", "moved") == 1
    sums = {"stages": 2, "blocks": 7, "seconds": 0.5, "frozen_seconds": 0.25}
    for name, value in sums.items():
        found = page.histogram(f"migration_{name}")
        assert (found.sum, sum(found.counts)) == (value, 1)


@pytest.mark.parametrize("result", [r for r in MigrationResult if r is not MigrationResult.MOVED])
def test_histograms_count_only_successful_moves(recorder: Recorder, result: MigrationResult):
    report = Report(
        request=request(), to=1, reason="operator", result=result, detail="why",
        num_copies=1, blocks=1, skipped=1, seconds=1.0, frozen_seconds=1.0,
    )  # fmt: skip
    recorder.telemetry.move(report)
    page = snapshot(recorder.page, ENGINE)
    assert page.counter("migrations", "operator", result) == 1
    assert sum(page.histogram("migration_stages").counts) == 0


def test_other_events_are_written(recorder: Recorder):
    recorder.telemetry.move(Report(request(""), -1, "draining", MigrationResult.HANDED_BACK, "it waited"))
    recorder.telemetry.preempted([request()])
    for state in (EngineState.SERVING, EngineState.SERVING, EngineState.DRAINING):
        recorder.telemetry.state(state)
    assert recorder.events == [
        HandedBack(255, "ff", "draining", "it waited"),
        Preempted(255, "cmpl-1-0", 3),
        EngineChanged("serving"),
        EngineChanged("draining"),
    ]


def test_every_reason_and_result_has_a_series():
    assert set(MOVE_RESULTS) == {*MigrationResult}
    assert set(MOVE_REASONS) == {*MigrationReason, MigrateTo(0, 0.0).reason}
