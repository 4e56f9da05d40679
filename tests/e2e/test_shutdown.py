"""SIGTERM: running requests finish, new ones are refused, and no process stays behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.ipc.child import EXIT_FAILED
from daemon.supervisor.supervisor import SAME_SIGNAL
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients

ENDLESS: dict[str, Any] = {"prompt": "x", "max_tokens": 8000, "stream": True}


def to_supervisor(daemon: Daemon) -> None:
    os.kill(daemon.process.pid, signal.SIGTERM)


def to_group(daemon: Daemon) -> None:
    os.killpg(daemon.process.pid, signal.SIGTERM)


def to_both(daemon: Daemon) -> None:
    """Send the signal as coreutils' `timeout` does: it is one signal, which arrives twice."""
    to_supervisor(daemon)
    time.sleep(0.05)
    to_group(daemon)


def await_draining(daemon: Daemon) -> None:
    """Wait until no frontend serves; a frontend without requests has ended already."""
    wait_for("draining", lambda: all(f["state"] != "serving" for f in daemon.status()["frontends"]))


def assert_nothing_left(daemon: Daemon) -> None:
    """Assert that no process, segment or socket of the daemon is left."""
    daemon.await_gone()
    assert not list(Path("/dev/shm").glob(f"llumd-{daemon.process.pid}-*"))
    assert not (daemon.run_dir / "admin.sock").exists()


@pytest.mark.parametrize("terminate", [to_supervisor, to_both])
def test_running_requests_finish_and_new_ones_are_refused(start: Start, terminate: Callable[[Daemon], None]) -> None:
    daemon = start("--frontends", "2", "--stub-step", "20ms", engine="hash")
    sent = [hash_engine.request(i, output=200, stream=i % 3 != 0) for i in range(8)]
    with httpx.Client() as old, Clients(daemon, sent) as clients:
        assert old.get(f"{daemon.url}/health/ready").status_code == 200
        clients.await_tokens(2)
        wait_for("8 requests", lambda: len(daemon.requests()) == 8)
        daemon.processes()
        terminate(daemon)
        await_draining(daemon)
        fresh = daemon.complete(max_tokens=1)
        kept = old.post(f"{daemon.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        for answer in (fresh, kept):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
        assert daemon.get("/health/ready").status_code == 503
        assert all(map(hash_engine.exact, sent, clients.join()))
    assert daemon.wait() == 0
    assert_nothing_left(daemon)


def test_drain_timeout_ends_running_requests(start: Start) -> None:
    daemon = start("--drain-timeout", "300ms", "--stub-step", "10ms")
    with Clients(daemon, [ENDLESS] * 4 + [ENDLESS | {"stream": False}]) as clients:
        clients.await_tokens(2)
        daemon.processes()
        assert daemon.terminate() == 0
        outcomes = clients.join()
    assert all(outcome.failed_cleanly for outcome in outcomes)
    assert (outcomes[-1].status, outcomes[-1].body["error"]["code"]) == (503, "shutting_down")
    assert "cut off" in daemon.log
    assert_nothing_left(daemon)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_cuts_running_requests_off_with_an_error(start: Start, number: signal.Signals) -> None:
    daemon = start("--drain-timeout", "10m", "--stub-step", "10ms")
    with Clients(daemon, [ENDLESS] * 2) as clients:
        clients.await_tokens(2)
        daemon.processes()
        daemon.process.send_signal(number)
        await_draining(daemon)
        time.sleep(SAME_SIGNAL)
        daemon.process.send_signal(number)
        assert daemon.wait(5) == EXIT_FAILED
        outcomes = clients.join()
    assert [outcome.errors[0]["code"] for outcome in outcomes] == ["shutting_down"] * 2
    assert all(outcome.failed_cleanly for outcome in outcomes)
    assert "second signal" in daemon.log
    assert_nothing_left(daemon)


@pytest.mark.parametrize("terminate", [to_supervisor, to_group])
def test_daemon_that_still_loads_exits_at_once(home: Path, terminate: Callable[[Daemon], None]) -> None:
    daemon = Daemon(home, "--devices", "cpu,cpu", "--kv-memory", "256MiB", "--drain-timeout", "10m", engine="model")
    try:
        wait_for("child processes", lambda: len(daemon.processes()) > 3)
        terminate(daemon)
        assert daemon.wait() == 0, daemon.log
        assert_nothing_left(daemon)
        assert "Traceback" not in daemon.log
    finally:
        daemon.clean_up()


def test_engine_killed_while_the_daemon_drains(start: Start) -> None:
    daemon = start("--drain-timeout", "10m", "--stub-step", "10ms", "--devices", "cpu")
    with Clients(daemon, [ENDLESS] * 2) as clients:
        clients.await_tokens(2)
        daemon.processes()
        to_supervisor(daemon)
        await_draining(daemon)
        daemon.kill("engine")
        assert all(outcome.failed_cleanly for outcome in clients.join())
        assert daemon.wait() == 0
    assert_nothing_left(daemon)
