"""What an operator is told of single moves: `llumctl events`, and the figures on /metrics."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.llumctl import EXIT_NOT_RUNNING
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import PYTHON, ROOT, Daemon, wait_for
from tests.e2e.load_client import Swarm, engine_of
from tests.e2e.mover import migrate

FLAGS = ("--frontends", "2", "--stub-step", "10ms", "--no-rebalance")
BODY = hash_engine.request(0, length=200, output=1000)


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared(*FLAGS, engine="hash")


def told(daemon: Daemon, *args: str) -> list[dict[str, Any]]:
    done = daemon.ctl("events", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def following(daemon: Daemon, out: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """`llumctl events --follow`, writing to `out`."""
    # What starts the tests in the background may have SIGINT ignored, and that is inherited.
    hearing = ["env", "--default-signal=INT", *PYTHON]
    command = [*hearing, "daemon.cli.llumctl", "--run-dir", str(daemon.run_dir), "events", "--follow", *args]
    with (
        out.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def series(daemon: Daemon, name: str) -> float:
    """The sum of the series that begin with `name`, which may end within the labels."""
    lines = [line for line in daemon.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_move_is_told_with_all_that_it_took(daemon: Daemon) -> None:
    names = ("llumd:migration_pause_seconds_count", 'llumd:dispatches_total{kind="first"')
    before = [series(daemon, name) for name in names]
    with Swarm(daemon, [BODY]) as swarm:
        swarm.await_tokens(20)
        name, [here] = swarm.outcomes[0].id, engine_of(daemon, swarm.outcomes)
        migrate(daemon, name, 1 - here)
        moved = wait_for("the end of the move", lambda: told(daemon, "--request", name, "--kind", "move_ended"))
        wait_for("the pause", lambda: series(daemon, names[0]) == before[0] + 1)
        rows = told(daemon, "--request", name)
        swarm.hang_up()
    daemon.await_idle()
    [row] = moved
    assert (row["process"], row["engine"], row["to"]) == (f"engine {here}", here, 1 - here)
    assert (row["result"], row["reason"]) == ("moved", "operator")
    assert row["stages"] >= 1 and row["nbytes"] > 0 and row["blocks"] > 0
    assert 0 < row["frozen_seconds"] <= row["seconds"]
    assert [row["kind"] for row in rows][:2] == ["dispatched", "ordered"]
    assert {row["kind"] for row in rows} == {"dispatched", "ordered", "taken_over", "move_ended"}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert {row["request"] for row in rows if row["kind"] != "ordered"} == {f"{name}-0"}
    assert series(daemon, names[1]) == before[1] + 1
    engine = f'{{engine="{here}"'
    assert series(daemon, f'llumd:engine_migrations_total{engine},reason="operator",result="moved"') == 1
    for figure in ("stages", "blocks", "seconds", "frozen_seconds"):
        assert series(daemon, f"llumd:engine_migration_{figure}_count{engine}") == 1
        assert series(daemon, f"llumd:engine_migration_{figure}_sum{engine}") == pytest.approx(row[figure])


def test_a_move_that_fails_is_told_with_its_reason(start: Start) -> None:
    """There is no room for the request where it is to go."""
    daemon = start(*FLAGS, "--max-num-seqs", "1", engine="hash")
    with Swarm(daemon, [BODY] * 2) as swarm:
        swarm.await_tokens(20)
        name, here = swarm.outcomes[0].id, engine_of(daemon, swarm.outcomes)[0]
        migrate(daemon, name, 1 - here)
        [row] = wait_for("the end of the move", lambda: told(daemon, "--kind", "move_ended"))
        assert (row["result"], row["detail"]) == ("declined", "the batch is full")
        assert (row["nbytes"], row["stages"], row["frozen_seconds"]) == (0, 0, 0)
        labels = f'{{engine="{here}",reason="operator",result="declined"'
        assert series(daemon, f"llumd:engine_migrations_total{labels}") == 1
        migrate(daemon, name, 1 - here, "recompute")
        rows = wait_for("a new start", lambda: told(daemon, "--request", name, "--kind", "dispatched")[1:])
        assert rows[0]["again"] == "handed back"
        assert told(daemon, "--kind", "handed_back")[0]["detail"] == "to be computed anew"
        assert "declined (the batch is full)" in daemon.ctl("events", "--request", name).stdout
        swarm.hang_up()


def test_orders_and_states_are_told(daemon: Daemon) -> None:
    count = len(told(daemon, "--kind", "ordered"))
    daemon.ctl("drain", "1")
    daemon.ctl("undrain", "1")
    assert daemon.ctl("drain", "7").returncode == 1
    orders = told(daemon, "--kind", "ordered")[count:]
    assert [(row["action"], row["engine"]) for row in orders] == [("drain", 1), ("undrain", 1)]
    assert all(row["by"].startswith("uid ") for row in orders)
    states = [row["state"] for row in told(daemon, "--kind", "engine") if row["engine"] == 1]
    assert states == ["serving", "draining", "serving"]
    daemon.await_whole()


def test_a_follower_goes_on_with_the_next_coordinator_and_ends_with_the_daemon(start: Start, tmp_path: Path) -> None:
    daemon = start(*FLAGS, engine="hash")
    out = tmp_path / "out"
    with following(daemon, out, "--kind", "dispatched") as follower:
        daemon.complete(max_tokens=1)
        wait_for("the first request", lambda: len(out.read_text().splitlines()) == 1)
        killed = daemon.kill("coordinator")
        daemon.complete(max_tokens=1)
        daemon.await_successor("coordinator", 0, killed)
        daemon.complete(max_tokens=1)
        wait_for("three requests", lambda: len(out.read_text().splitlines()) == 3)
        assert daemon.terminate() == 0
        _, complaint = follower.communicate(timeout=20)
        assert follower.returncode == EXIT_NOT_RUNNING
        assert "not running" in complaint and len(complaint.splitlines()) == 1


def test_ctrl_c_ends_a_follower(daemon: Daemon, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with following(daemon, out) as follower:
        wait_for("the first lines", lambda: "serving" in out.read_text())
        follower.send_signal(signal.SIGINT)
        assert follower.communicate(timeout=20) == (None, "")
        assert follower.returncode == 0


def test_a_follower_who_does_not_read_holds_nobody_up(start: Start) -> None:
    daemon = start(*FLAGS, engine="hash")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(daemon.run_dir / "admin.sock"))
        deaf.sendall(b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        body = hash_engine.request(0, length=16, output=1)
        for _ in range(16):  # more rows than the socket holds
            with Swarm(daemon, [body] * 100) as swarm:
                assert all(outcome.status == 200 for outcome in swarm.join())
        rows = told(daemon)
        assert sum(row["kind"] == "dispatched" for row in rows) > 300
        assert daemon.terminate() == 0


def test_nonsense_is_refused(daemon: Daemon) -> None:
    assert daemon.ctl("events", "--kind", "nonsense").returncode == 2
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(daemon.run_dir / "admin.sock"))
        client.sendall(b"GET /v1/events?since=yesterday HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 400") and "seconds since 1970" in answer
