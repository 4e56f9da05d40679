"""`llumctl restart`: what is replaced in which order, and what happens if it fails."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import restarts
from daemon.cli.admin_client import CtlError, Lost, Refused
from daemon.cli.engine_orders import Interrupted, TooLate
from daemon.cli.restarts import Target, restart, targets

PATH = Path("admin.sock")


class FakeDaemon:
    """Answers as the admin API does. `orders`: what it was told. `fail`: an error to raise at one of them."""

    def __init__(self, engines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.orders: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.lost = 0  # answers that are lost from now on
        self._rows: dict[str, Any] = {
            "engines": [{"engine": i, "state": state, "desired": state} for i, state in enumerate(engines)],
            "frontends": [{"state": "serving"}, {"state": "serving"}],
            "coordinator": {"state": "serving"},
        }
        for row in itertools.chain(self._rows["engines"], self._rows["frontends"], [self._rows["coordinator"]]):
            row["incarnation"] = 1
        for name in ("read", "call", "carry_out", "order"):
            monkeypatch.setattr(restarts, name, getattr(self, name))
        monkeypatch.setattr(restarts, "load_timeout", lambda _: 5.0)

    def read(self, _path: Path, _route: str) -> dict[str, Any]:
        if self.lost:
            self.lost -= 1
            raise Lost("no answer")
        return self._rows

    def call(self, _path: Path, _method: str, route: str) -> dict[str, Any]:
        self._do(route)
        _, _, role, *rest = route.split("/")
        row = self._rows["coordinator"] if role == "coordinator" else self._rows[role][int(rest[0])]
        row["incarnation"] += 1
        self.lost = 3 if role == "coordinator" else 0
        return {"incarnation": row["incarnation"] - 1}

    def carry_out(self, path: Path, name: str, number: int, *_: object) -> None:
        self.order(path, name, number)

    def order(self, _path: Path, name: str, number: int) -> str:
        self._do(f"{name} {number}")
        row, state = self._rows["engines"][number], {"drain": "draining", "undrain": "serving"}[name]
        row["state"] = row["desired"] = state
        return state

    def _do(self, what: str) -> None:
        self.orders.append(what)
        if what in self.fail:
            raise self.fail[what]


def run(what: str = "all", number: int | None = None) -> tuple[list[str], list[str]]:
    """Return the processes that were replaced, and the lines of progress."""
    lines: list[str] = []
    rows = restart(PATH, what, number, 1.0, lines.append)
    return [row["process"] for row in rows if row["restarted"]], lines


def test_everything_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(["serving", "draining", "parked"], monkeypatch)
    replaced, lines = run()
    assert replaced == ["engine 0", "engine 1", "frontend 0", "frontend 1", "coordinator"]
    assert daemon.orders == [
        "/v1/engines/0/restart",  # no other serves, so it is not emptied
        "/v1/engines/1/restart",  # it stays drained
        "/v1/frontends/0/restart",
        "/v1/frontends/1/restart",
        "/v1/coordinator/restart",
    ]
    assert "engine 0 is the only one that serves: its requests wait until it serves again" in lines
    assert "engine 2 is parked; its next process starts when it wakes" in lines


def test_an_engine_is_emptied_before_and_serves_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(["serving", "serving"], monkeypatch)
    assert run("engine", 1)[0] == ["engine 1"]
    assert daemon.orders == ["drain 1", "/v1/engines/1/restart", "undrain 1"]


@pytest.mark.parametrize(
    ("at", "error", "undrained"),
    [
        ("drain 0", TooLate("late", {}), True),
        ("/v1/engines/0/restart", Refused("another layout", "other_layout"), True),
        ("drain 0", Refused("replaced", "order_replaced"), False),
    ],
)
def test_a_failure_ends_it_and_the_engine_serves_on(
    monkeypatch: pytest.MonkeyPatch, at: str, error: CtlError, undrained: bool
) -> None:
    daemon = FakeDaemon(["serving", "serving"], monkeypatch)
    daemon.fail[at] = error
    with pytest.raises(type(error), match="; not replaced: engine 1, frontend 0, frontend 1, coordinator"):
        run()
    assert (daemon.orders[-1] == "undrain 0") == undrained


def test_an_interruption_leaves_no_engine_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(["serving", "serving"], monkeypatch)
    daemon.fail["drain 1"] = Interrupted("by the operator")
    with pytest.raises(Interrupted, match="interrupted while engine 1 was replaced; not replaced: frontend 0"):
        run()
    assert daemon.orders == ["drain 0", "/v1/engines/0/restart", "undrain 0", "drain 1", "undrain 1"]


def test_a_process_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(["serving"], monkeypatch)
    monkeypatch.setattr(restarts, "LIMIT", 0.1)
    daemon._rows["frontends"][1]["state"] = "loading"
    with pytest.raises(TooLate, match=r"frontend 1 does not serve .*: its state is loading"):
        run("frontend", 1)
    daemon._rows["frontends"][1]["state"] = "failed"
    with pytest.raises(Refused, match="frontend 1 cannot run any more"):
        run("frontend", 1)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDaemon(["serving"], monkeypatch)
    assert targets({}, "coordinator", None) == [Target("coordinator")]
    with pytest.raises(Refused, match="there is no engine 4"):
        run("engine", 4)
    with pytest.raises(Refused, match="there is no frontend -1"):
        run("frontend", -1)


def test_a_second_restart_waits_for_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeDaemon(["serving", "serving"], monkeypatch)
    lines: list[str] = []
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(restart, tmp_path / "admin.sock", "coordinator", None, 1.0, lines.append)
        while not lines:
            time.sleep(0.01)
        assert lines == ["another `llumctl restart` runs: waiting for its end"] and not second.done()
        os.close(directory)
        assert [row["process"] for row in second.result(10)] == ["coordinator"]


def test_a_directory_that_cannot_be_read_has_no_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeDaemon(["serving"], monkeypatch)
    assert restart(tmp_path / "nothing" / "admin.sock", "coordinator", None, 1.0, lambda _: None)[0]["restarted"]
