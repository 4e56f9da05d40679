"""The wait of `llumctl drain`, `undrain`, `park` and `wake`: when it ends, and what it says meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.cli.admin_client import Refused
from daemon.cli.engine_orders import GRACE, VERBS, Look, Reporter, judge, num_requests, progress

DESIRED = {"drain": "draining", "undrain": "serving", "park": "parked", "wake": "serving"}


def row(state: str, requests: int = 0, desired: str = "", **others: Any) -> dict[str, Any]:
    """Return the status row of engine 1."""
    return {
        "engine": 1,
        "state": state,
        "desired": desired,
        "running": requests,
        "last_exit": "signal SIGKILL",
    } | others


def look(name: str, state: str, requests: int = 0, *, waited: float = 0.0, within: float = 10.0) -> Look:
    desired = DESIRED[name]
    return judge(VERBS[name], desired, row(state, requests, desired), waited, within)


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("drain", {"draining", "parking", "parked"}),
        ("park", {"parked"}),
        ("wake", {"serving"}),
        ("undrain", {"serving"}),
    ],
)
def test_the_wait_ends_in_the_desired_state_only(name: str, states: set[str]):
    others = {"starting", "loading", "serving", "draining", "parking", "parked", "dead"} - states
    for waited in (0.0, 11.0, 99.0):
        assert all(look(name, state, waited=waited) is Look.DONE for state in states)
    assert all(look(name, state) is Look.WAIT for state in others)
    assert all(look(name, state, waited=99.0) is Look.LATE for state in others)


@pytest.mark.parametrize(
    ("name", "state"), [("park", "parking"), ("park", "draining"), ("drain", "serving"), ("wake", "draining")]
)
def test_an_engine_that_is_nearly_there_at_the_limit_gets_a_moment_more(name: str, state: str):
    """`park --within` must not report a failure while the process of the empty engine ends."""
    assert look(name, state, waited=10.0 + GRACE / 2) is Look.WAIT
    assert look(name, state, waited=10.1 + GRACE) is Look.LATE
    assert look(name, "loading", waited=10.1) is Look.LATE


def test_an_engine_with_requests_left_is_late_at_the_limit():
    for name in ("drain", "park"):
        assert look(name, "draining", 3, waited=9.9) is Look.WAIT
        assert look(name, "draining", 3, waited=10.1) is Look.LATE


def test_the_wait_ends_if_another_order_replaces_this_one_or_the_engine_cannot_run():
    with pytest.raises(Refused, match="another order has changed the desired state of engine 1 to serving") as e:
        judge(VERBS["drain"], "draining", row("draining", 0, "serving"), 0.0, 10.0)
    assert e.value.code == "order_replaced"
    with pytest.raises(Refused, match="engine 1 cannot run") as e:
        look("wake", "failed")
    assert e.value.code == "engine_failed"


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        (row("draining", 3, waiting=2), "it is draining, with 5 requests left"),
        (row("draining", 1), "it is draining, with 1 request left"),
        (row("parking"), "it is empty; its process ends"),
        (row("parked"), "it is parked; its process will be started"),
        (row("dead"), "its process has died (signal SIGKILL) and will be started again"),
        (row("starting"), "its process starts"),
        (row("loading"), "it loads the model"),
    ],
)
def test_progress_in_words(engine: dict[str, Any], text: str):
    assert progress(engine) == text


def test_a_request_that_migrates_away_counts_once():
    assert num_requests(row("draining", 4, outgoing=4, waiting=1, incoming=2)) == 7
    assert num_requests(row("draining", 0, outgoing=1)) == 1


def test_progress_is_printed_when_it_changes_and_once_in_ten_seconds():
    lines: list[str] = []
    reporter = Reporter(lines.append)
    for tenths in range(251):
        reporter.report(1, "it loads the model" if tenths >= 30 else "its process starts", tenths / 10)
    assert lines == [
        "engine 1: its process starts (1 s)",
        "engine 1: it loads the model (3 s)",
        "engine 1: it loads the model (13 s)",
        "engine 1: it loads the model (23 s)",
    ]
