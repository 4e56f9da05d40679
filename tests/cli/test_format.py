"""The text output of `llumctl events`: one line for each kind of event."""

from __future__ import annotations

from typing import get_args

import pytest

from daemon.cli.format import RequestFilter, event_line
from daemon.control.event_history import EventHistory
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import (
    KINDS,
    Dispatched,
    EngineChanged,
    Event,
    Finished,
    HandedBack,
    MoveEnded,
    Ordered,
    Preempted,
    TakenOver,
    clipped,
)
from daemon.ipc.fabric import COORDINATOR, Fabric, Topology

LINES: dict[Event, str] = {
    Dispatched(
        rid=255, request="cmpl-a-0", engine=1, prompt_tokens=9, priority=-1, again="handed back", x_request_id="7f"
    ): "dispatched  cmpl-a-0 to engine 1, 9 prompt tokens, priority -1, again: handed back, x-request-id 7f",
    Finished(
        rid=255, request="cmpl-a-0", engine=1, result="engine", output_tokens=1, seconds=2.5, detail="no memory"
    ): "finished    cmpl-a-0 on engine 1: ended early by engine (no memory), 1 output token, 2.50 s",
    Finished(
        rid=255, request="cmpl-a-0", engine=1, result="stop", output_tokens=7, seconds=2.5, x_request_id="7f"
    ): "finished    cmpl-a-0 on engine 1: stop, 7 output tokens, 2.50 s, x-request-id 7f",
    TakenOver(
        rid=255, request="cmpl-a-0", engine=0, to=1, epoch=2, output_tokens=7
    ): "taken_over  cmpl-a-0 from engine 0 to engine 1 after 7 tokens",
    MoveEnded(
        rid=255,
        request="cmpl-a-0",
        to=1,
        reason="memory",
        result="moved",
        detail="",
        stages=2,
        blocks=7,
        skipped=3,
        nbytes=3 << 20,
        seconds=0.5,
        frozen_seconds=0.0021,
    ): "move_ended  cmpl-a-0 to "
    "engine 1, reason memory: moved; 3.0 MiB, 7 blocks + 3 already there, 2 stages, 500.0 ms, frozen 2.1 ms",
    HandedBack(
        rid=255, request="cmpl-a-0", reason="draining", detail="it waited"
    ): "handed_back cmpl-a-0, reason draining: it waited",
    Preempted(rid=255, request="cmpl-a-0", tokens=12): "preempted   cmpl-a-0: 12 tokens to recompute",
    EngineChanged(state="draining"): "engine      draining",
    Ordered(
        action="migrate", request="cmpl-a", engine=1, detail="live", by="uid 0"
    ): "ordered     migrate cmpl-a, engine 1, live, by uid 0",
}


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(Fabric.create(Topology(1, 1), 1 << 16, 1 << 16), COORDINATOR, 1)


def test_every_kind_has_a_line(fabric: Fabric):
    assert {type(event) for event in LINES} == {*get_args(Event)}
    writer, event_history = EventWriter(fabric.events(fabric.topology.engine(0))), EventHistory(fabric)
    for event in LINES:
        writer.write(event)
    rows = event_history.read()
    assert [event_line(row)[14:] for row in rows] == [f"engine 0     {line}" for line in LINES.values()]
    assert {*KINDS} == {row["kind"] for row in rows} | {"missed"}
    about = [row["kind"] != "engine" for row in rows]
    assert [RequestFilter("cmpl-a").concerns(row) for row in rows] == about
    assert [RequestFilter("ff").concerns(row) for row in rows] == ["rid" in row for row in rows]
    assert [RequestFilter("cmpl-a-0").concerns(row) for row in rows] == about
    assert not any(RequestFilter(other).concerns(row) for row in rows for other in ("cmpl", "cmpl-a-1-0", "cmpl-b"))


def test_the_events_of_an_x_request_id_are_those_of_its_choices():
    """Only the first and the last event of a request have it, and the first may be overwritten already."""
    name = "a" * 80
    ends = [{"rid": i, "request": f"cmpl-a-{i}", "x_request_id": clipped(name)} for i in range(2)]
    others = [{"rid": 0, "request": "cmpl-a-0"}, {"request": "cmpl-a-1"}, {"rid": 7, "request": "cmpl-b-0"}]
    wanted = RequestFilter(name)
    assert not any(map(wanted.concerns, [*ends, *others]))
    for row in [*others, *ends]:
        wanted.learn(row)
    assert [*map(wanted.concerns, [*ends, *others])] == [True, True, True, True, False]
    nameless = RequestFilter("cmpl-c")
    nameless.learn({"rid": 1, "request": "cmpl-a-0", "x_request_id": ""})
    assert not any(map(nameless.concerns, others))


def test_logs_are_merged_by_time_and_gaps_are_reported(fabric: Fabric):
    event_history = EventHistory(fabric)
    writers = [EventWriter(fabric.events(p)) for p in range(fabric.topology.processes)]
    for n in range(30):
        writers[n % 3].write(Preempted(rid=n, request="", tokens=0))
    rows = event_history.read()
    assert [row["rid"] for row in rows] == list(range(30))
    assert event_history.read() == []
    assert [row["rid"] for row in EventHistory(fabric).read(since=rows[9]["time"])] == list(range(10, 30))
    for _ in range(600):
        writers[1].write(EngineChanged("serving"))
    first, *rest = event_history.read()
    assert (first["kind"], first["process"]) == ("missed", "frontend 0") and first["count"] + len(rest) == 600
    assert event_line(first).endswith(f"{first['count']} events were overwritten before they could be read")


def test_an_unknown_kind_of_a_newer_daemon_is_shown_with_all_fields():
    row = {"time": 0.0, "process": "engine 0", "kind": "paused", "why": "test"}
    assert event_line(row).endswith("engine 0     paused      why=test")
