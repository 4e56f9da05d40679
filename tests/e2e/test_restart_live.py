"""`llumctl restart`: every process is replaced while streams run, and no stream notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from daemon.cli import admin_client
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.exact_lanes import connect, stream
from tests.e2e.hash_engine import expected, request

pytestmark = pytest.mark.e2e
LANES = 4


@pytest.fixture(scope="module")
def daemon(start_shared) -> Iterator[Daemon]:
    return start_shared("--devices", "cpu,cpu", "--frontends", "2", engine="hash", standby=True)


def incarnations(daemon: Daemon) -> dict[str, int]:
    status = daemon.status()
    rows = {f"{role} {i}": row for role in ("engine", "frontend") for i, row in enumerate(status[f"{role}s"])}
    return {name: row["incarnation"] for name, row in (rows | {"coordinator": status["coordinator"]}).items()}


def test_everything_is_replaced_under_load(daemon: Daemon) -> None:
    before, stop = incarnations(daemon), Event()
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [pool.submit(stream, daemon, lane, stop, 120) for lane in range(LANES)]
        try:
            done = daemon.ctl("restart", "all", timeout=200)
        finally:
            stop.set()
        assert all(lane.result() for lane in lanes)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "replaced: engine 0, engine 1, frontend 0, frontend 1, coordinator\n"
    assert incarnations(daemon) == {name: number + 1 for name, number in before.items()}
    status = daemon.status()
    assert [row["restarts"] for row in [*status["engines"], *status["frontends"], status["coordinator"]]] == [0] * 5
    assert all(row["desired"] == row["state"] == "serving" for row in status["engines"])
    assert daemon.metric("llumd:responses_cut_total") == daemon.metric("llumd:resumes_total") == 0
    daemon.await_idle()


def test_one_process_or_what_cannot_be_replaced(daemon: Daemon) -> None:
    before = incarnations(daemon)
    done = daemon.ctl("restart", "frontend", "1", "--json", timeout=60)
    assert json.loads(done.stdout)["processes"][0] | {"seconds": 0} == {
        "process": "frontend 1",
        "restarted": True,
        "seconds": 0,
    }
    assert incarnations(daemon) == before | {"frontend 1": before["frontend 1"] + 1}
    for arguments, text in (
        (("engine", "7"), "there is no engine 7"),
        (("engine",), "engine needs a number"),
        (("all", "1"), "all has no number"),
        (("supervisor",), "invalid choice"),
    ):
        done = daemon.ctl("restart", *arguments)
        assert done.returncode and text in done.stderr


def descriptors(daemon: Daemon) -> list[int]:
    return [len(list(Path(f"/proc/{row['pid']}/fd").iterdir())) for row in daemon.status()["frontends"]]


def test_a_request_that_arrives_during_the_hand_over_is_answered(daemon: Daemon) -> None:
    """Half of its head has arrived when its frontend is told to hand over."""
    fields = request(8888, output=60)
    data = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    daemon.await_idle()
    idle = descriptors(daemon)
    with closing(connect(daemon)) as client:
        client.sock.sendall(sent[:30])
        wait_for("a frontend with the connection", lambda: descriptors(daemon) != idle)
        k = next(k for k in (0, 1) if descriptors(daemon)[k] != idle[k])
        before, replaced = incarnations(daemon)[f"frontend {k}"], daemon.log.count(" is replaced")
        admin_client.call(daemon.run_dir / "admin.sock", "POST", f"/v1/frontends/{k}/restart")
        wait_for("the order followed", lambda: daemon.log.count(" is replaced") > replaced)
        client.sock.sendall(sent[30:])
        answer = client.read()
    assert [entry["tokens"] for entry in answer.logprobs[0]] == expected(fields)
    wait_for("the successor", lambda: incarnations(daemon)[f"frontend {k}"] > before)
    daemon.await_serving()


def test_a_drained_engine_stays_so_and_the_last_one_is_restarted_with_its_requests(daemon: Daemon) -> None:
    assert daemon.ctl("drain", "1").returncode == 0
    fields = request(7777, output=150)
    with closing(connect(daemon)) as client, ThreadPoolExecutor(1) as pool:
        client.send("/v1/completions", fields)
        reading = pool.submit(client.read)
        done = daemon.ctl("restart", "engine", "0", timeout=60)
        assert "engine 0 is the only one that serves" in done.stderr
        assert done.returncode == 0
        assert [entry["tokens"] for entry in reading.result().logprobs[0]] == expected(fields)
    assert daemon.ctl("restart", "engine", "1", timeout=60).returncode == 0
    assert [row["state"] for row in daemon.status()["engines"]] == ["serving", "draining"]
    assert daemon.ctl("undrain", "1").returncode == 0
