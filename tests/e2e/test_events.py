"""`llumctl events`, and the metrics of single migrations."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.cli.admin_client import NotRunning
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import PYTHON, ROOT, Daemon, wait_for
from tests.e2e.load_client import Clients, engines_of
from tests.e2e.mover import migrate

FLAGS = ("--frontends", "2", "--stub-step", "10ms", "--no-rebalance")
BODY = hash_engine.request(0, length=200, output=1000)


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared(*FLAGS, engine="hash")


def events(daemon: Daemon, *args: str) -> list[dict[str, Any]]:
    """Return the rows of `llumctl events --json`."""
    done = daemon.ctl("events", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def following(daemon: Daemon, out: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run `llumctl events --follow` with its output in `out`."""
    # A shell that starts the tests in the background may ignore SIGINT, and children inherit that.
    with_default_sigint = ["env", "--default-signal=INT", *PYTHON]
    command = [
        *with_default_sigint,
        "daemon.cli.llumctl",
        "--run-dir",
        str(daemon.run_dir),
        "events",
        "--follow",
        *args,
    ]
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
    """Return the sum of the series that start with `name`, which may include some of the labels."""
    lines = [line for line in daemon.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_migration_is_reported_with_all_its_figures(daemon: Daemon) -> None:
    names = ("llumd:migration_pause_seconds_count", 'llumd:dispatches_total{kind="first"')
    before = [series(daemon, name) for name in names]
    with Clients(daemon, [BODY]) as clients:
        clients.await_tokens(20)
        name, [here] = clients.outcomes[0].id, engines_of(daemon, clients.outcomes)
        migrate(daemon, name, 1 - here)
        moved = wait_for(
            "the end of the migration", lambda: events(daemon, "--request", name, "--kind", "move_ended")
        )
        wait_for("the pause metric", lambda: series(daemon, names[0]) == before[0] + 1)
        rows = events(daemon, "--request", name)
        clients.hang_up()
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
    for name in ("stages", "blocks", "seconds", "frozen_seconds"):
        assert series(daemon, f"llumd:engine_migration_{name}_count{engine}") == 1
        assert series(daemon, f"llumd:engine_migration_{name}_sum{engine}") == pytest.approx(row[name])


def test_failed_migration_is_reported_with_its_reason(start: Start) -> None:
    """The destination has no room for the request."""
    daemon = start(*FLAGS, "--max-num-seqs", "1", engine="hash")
    with Clients(daemon, [BODY] * 2) as clients:
        clients.await_tokens(20)
        name, here = clients.outcomes[0].id, engines_of(daemon, clients.outcomes)[0]
        migrate(daemon, name, 1 - here)
        [row] = wait_for("the end of the migration", lambda: events(daemon, "--kind", "move_ended"))
        assert (row["result"], row["detail"]) == ("declined", "the batch is full")
        assert (row["nbytes"], row["stages"], row["frozen_seconds"]) == (0, 0, 0)
        labels = f'{{engine="{here}",reason="operator",result="declined"'
        assert series(daemon, f"llumd:engine_migrations_total{labels}") == 1
        migrate(daemon, name, 1 - here, "recompute")
        rows = wait_for("a new dispatch", lambda: events(daemon, "--request", name, "--kind", "dispatched")[1:])
        assert rows[0]["again"] == "handed back"
        assert events(daemon, "--kind", "handed_back")[0]["detail"] == "its KV is to be recomputed"
        assert "declined (the batch is full)" in daemon.ctl("events", "--request", name).stdout
        clients.hang_up()


def test_one_request_is_followed_by_the_id_that_its_client_knows(daemon: Daemon) -> None:
    body = hash_engine.request(0, length=16, output=20, stream=False)
    name = "trace-" + "0" * 80

    def send(**headers: str) -> tuple[str, str]:
        """Return the ids in the header and in the body of the answer."""
        answer = httpx.post(f"{daemon.url}/v1/completions", json=body, headers=headers, timeout=20)
        return answer.headers["x-request-id"], answer.json()["id"]

    header, own = send()
    assert header == own
    for asked in (header, f"{own}-0"):
        rows = events(daemon, "--request", asked)
        assert [row["kind"] for row in rows] == ["dispatched", "finished"]
        assert (rows[1]["result"], rows[1]["output_tokens"]) == ("length", 20)
    header, own = send(**{"x-request-id": name})
    assert header == name != own
    assert events(daemon, "--request", name) == events(daemon, "--request", own)
    text = daemon.ctl("events", "--request", name).stdout
    assert f"{own}-0 to engine" in text and "length, 20 output tokens" in text
    unknown = daemon.ctl("events", "--request", "cmpl-unknown")
    assert (unknown.returncode, unknown.stdout) == (0, "")
    assert "no event of cmpl-unknown is kept" in unknown.stderr


def test_the_end_of_a_cancelled_request_says_what_cancelled_it(daemon: Daemon) -> None:
    def result(name: str) -> str:
        rows = wait_for("the last event", lambda: events(daemon, "--request", name, "--kind", "finished"))
        return str(rows[0]["result"])

    with Clients(daemon, [BODY] * 2) as clients:
        clients.await_tokens(5)
        left, ordered = (outcome.id for outcome in clients.outcomes)
        clients.hang_up(0)
        assert daemon.ctl("cancel", ordered).returncode == 0
        assert result(left) == "client"
        assert result(ordered) == "operator"
    daemon.await_idle()


def test_an_order_may_name_the_x_request_id(daemon: Daemon) -> None:
    with httpx.stream(
        "POST", f"{daemon.url}/v1/completions", json=BODY, headers={"x-request-id": "my-trace"}, timeout=20
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert [row["x_request_id"] for row in daemon.requests()] == ["my-trace"]
        assert daemon.ctl("cancel", "my-trace").returncode == 0
        assert any("cancelled" in line for line in lines)
    daemon.await_idle()


def test_orders_and_engine_states_are_reported(daemon: Daemon) -> None:
    count = len(events(daemon, "--kind", "ordered"))
    daemon.ctl("drain", "1")
    daemon.ctl("undrain", "1")
    assert daemon.ctl("drain", "7").returncode == 1
    orders = events(daemon, "--kind", "ordered")[count:]
    assert [(row["action"], row["engine"]) for row in orders] == [("drain", 1), ("undrain", 1)]
    assert all(row["by"].startswith("uid ") for row in orders)
    states = [row["state"] for row in events(daemon, "--kind", "engine") if row["engine"] == 1]
    assert states == ["serving", "draining", "serving"]
    daemon.await_serving()


def test_follower_continues_with_the_next_coordinator_and_ends_with_the_daemon(start: Start, tmp_path: Path) -> None:
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
        _, error = follower.communicate(timeout=20)
        assert follower.returncode == NotRunning.exit_code
        assert "not running" in error and len(error.splitlines()) == 1


def test_ctrl_c_ends_a_follower_without_an_error(daemon: Daemon, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with following(daemon, out) as follower:
        wait_for("the first lines", lambda: "serving" in out.read_text())
        follower.send_signal(signal.SIGINT)
        _, errors = follower.communicate(timeout=20)
        assert errors == ""
        assert follower.returncode == 0


def test_follower_that_does_not_read_blocks_only_itself(start: Start) -> None:
    daemon = start(*FLAGS, engine="hash")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(daemon.run_dir / "admin.sock"))
        silent.sendall(b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        body = hash_engine.request(0, length=16, output=1)
        for _ in range(16):  # more rows than the socket buffer holds
            with Clients(daemon, [body] * 100) as clients:
                assert all(outcome.status == 200 for outcome in clients.join())
        rows = events(daemon)
        assert sum(row["kind"] == "dispatched" for row in rows) > 300
        assert daemon.terminate() == 0


def test_invalid_arguments_are_refused(daemon: Daemon) -> None:
    assert daemon.ctl("events", "--kind", "nonsense").returncode == 2
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(daemon.run_dir / "admin.sock"))
        client.sendall(b"GET /v1/events?since=yesterday HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 400") and "seconds since 1970" in answer
