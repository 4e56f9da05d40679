"""SIGTERM: what runs may finish, nothing new begins, and nobody stays behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Swarm

ENDLESS: dict[str, Any] = {"prompt": "x", "max_tokens": 8000, "stream": True}


def to_supervisor(daemon: Daemon) -> None:
    os.kill(daemon.process.pid, signal.SIGTERM)


def to_group(daemon: Daemon) -> None:
    os.killpg(daemon.process.pid, signal.SIGTERM)


def drains(daemon: Daemon) -> None:
    """Until no frontend serves; one without requests is gone already."""
    wait_for("draining", lambda: all(f["state"] != "serving" for f in daemon.status()["frontends"]))


def nothing_left(daemon: Daemon) -> None:
    wait_for("every process gone", lambda: not daemon.family(), 2.0)
    assert not list(Path("/dev/shm").glob(f"llumd-{daemon.process.pid}-*"))
    assert not (daemon.run_dir / "admin.sock").exists()


@pytest.mark.parametrize("terminate", [to_supervisor, to_group])
def test_running_answers_finish_and_new_ones_are_refused(start: Start, terminate: Callable[[Daemon], None]) -> None:
    daemon = start("--frontends", "2", "--stub-step", "20ms", engine="hash")
    asked = [hash_engine.request(i, output=200, stream=i % 3 != 0) for i in range(8)]
    with httpx.Client() as old, Swarm(daemon, asked) as swarm:
        assert old.get(f"{daemon.url}/health/ready").status_code == 200
        swarm.await_tokens(2)
        wait_for("everybody's start", lambda: len(daemon.requests()) == 8)
        daemon.family()
        terminate(daemon)
        drains(daemon)
        fresh = daemon.complete(max_tokens=1)
        kept = old.post(f"{daemon.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        for answer in (fresh, kept):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
        assert daemon.get("/health/ready").status_code == 503
        assert all(map(hash_engine.exact, asked, swarm.join()))
    assert daemon.wait() == 0
    nothing_left(daemon)


def test_drain_timeout_cuts_off(start: Start) -> None:
    daemon = start("--drain-timeout", "300ms", "--stub-step", "10ms")
    with Swarm(daemon, [ENDLESS] * 4) as swarm:
        swarm.await_tokens(2)
        daemon.family()
        assert daemon.terminate() == 0
        outcomes = swarm.join()
    assert all(outcome.failed_cleanly for outcome in outcomes)
    assert "cut off" in daemon.log
    nothing_left(daemon)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_hurries(start: Start, number: signal.Signals) -> None:
    daemon = start("--drain-timeout", "10m", "--stub-step", "10ms")
    with Swarm(daemon, [ENDLESS] * 2) as swarm:
        swarm.await_tokens(2)
        daemon.family()
        daemon.process.send_signal(number)
        drains(daemon)
        daemon.process.send_signal(number)
        assert daemon.wait(5) == 0
        assert all(outcome.ended for outcome in swarm.join())
    nothing_left(daemon)


@pytest.mark.parametrize("terminate", [to_supervisor, to_group])
def test_a_daemon_that_still_loads_leaves_at_once(home: Path, terminate: Callable[[Daemon], None]) -> None:
    daemon = Daemon(home, "--devices", "cpu,cpu", "--kv-memory", "256MiB", "--drain-timeout", "10m", engine="model")
    try:
        wait_for("its children", lambda: len(daemon.family()) > 3)
        terminate(daemon)
        assert daemon.wait() == 0, daemon.log
        nothing_left(daemon)
        assert "Traceback" not in daemon.log
    finally:
        daemon.clean_up()


def test_engines_die_while_the_daemon_drains(start: Start) -> None:
    daemon = start("--drain-timeout", "10m", "--stub-step", "10ms", "--devices", "cpu")
    with Swarm(daemon, [ENDLESS] * 2) as swarm:
        swarm.await_tokens(2)
        daemon.family()
        to_supervisor(daemon)
        drains(daemon)
        daemon.kill("engine")
        assert all(outcome.failed_cleanly for outcome in swarm.join())
        assert daemon.wait() == 0
    nothing_left(daemon)
