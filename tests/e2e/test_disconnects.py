"""A request is freed as soon as its client hangs up."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients

BATCH = 2  # max_num_seqs


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--max-num-seqs", str(BATCH), "--stub-step", "10ms")


def load(daemon: Daemon) -> tuple[int, int]:
    """Return (running, waiting), summed over both engines."""
    engines = daemon.status()["engines"]
    return sum(e["running"] for e in engines), sum(e["waiting"] for e in engines)


def endless(stream: bool) -> dict[str, Any]:
    return {"prompt": "once upon a time", "max_tokens": 8000, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_hang_up_frees_running_and_waiting_requests(daemon: Daemon, stream: bool) -> None:
    with Clients(daemon, [endless(stream)] * 10) as clients:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 10 - 2 * BATCH))
        assert all(e["kv_used_blocks"] for e in daemon.status()["engines"])
        clients.hang_up()
        daemon.await_idle()
    assert not any(outcome.status >= 400 for outcome in clients.outcomes)


def test_hang_up_of_waiting_requests_does_not_disturb_the_batch(daemon: Daemon) -> None:
    with Clients(daemon, [endless(True)] * 10) as clients:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 10 - 2 * BATCH))
        wait_for("first tokens of the batch", lambda: sum(bool(o.text) for o in clients.outcomes) == 2 * BATCH)
        clients.hang_up(*[i for i, o in enumerate(clients.outcomes) if not o.text])
        wait_for("an empty queue", lambda: load(daemon) == (2 * BATCH, 0))
        clients.hang_up()
        daemon.await_idle()


def test_waiting_requests_move_up_when_running_ones_hang_up(daemon: Daemon) -> None:
    with Clients(daemon, [endless(True)] * 6) as clients:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 2))
        clients.hang_up(*[i for i, o in enumerate(clients.outcomes) if o.text])
        wait_for("an empty queue", lambda: load(daemon)[1] == 0)
        clients.hang_up()
        daemon.await_idle()
    assert daemon.complete(max_tokens=3).status_code == 200
