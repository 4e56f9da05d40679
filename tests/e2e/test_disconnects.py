"""A client that hangs up costs nothing from then on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Swarm

BATCH = 2  # places in a batch


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--max-num-seqs", str(BATCH), "--stub-step", "10ms")


def load(daemon: Daemon) -> tuple[int, int]:
    """(running, waiting) of both engines together."""
    engines = daemon.status()["engines"]
    return sum(e["running"] for e in engines), sum(e["waiting"] for e in engines)


def endless(stream: bool) -> dict[str, Any]:
    return {"prompt": "once upon a time", "max_tokens": 8000, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_hang_up_frees_running_and_waiting(daemon: Daemon, stream: bool) -> None:
    with Swarm(daemon, [endless(stream)] * 10) as swarm:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 10 - 2 * BATCH))
        assert all(e["kv_used_blocks"] for e in daemon.status()["engines"])
        swarm.hang_up()
        daemon.await_idle()
    assert not any(outcome.status >= 400 for outcome in swarm.outcomes)


def test_hang_up_in_the_queue_leaves_the_batch_alone(daemon: Daemon) -> None:
    with Swarm(daemon, [endless(True)] * 10) as swarm:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 10 - 2 * BATCH))
        wait_for("first tokens of the batch", lambda: sum(bool(o.text) for o in swarm.outcomes) == 2 * BATCH)
        swarm.hang_up(*[i for i, o in enumerate(swarm.outcomes) if not o.text])
        wait_for("an empty queue", lambda: load(daemon) == (2 * BATCH, 0))
        swarm.hang_up()
        daemon.await_idle()


def test_a_place_that_becomes_free_is_taken(daemon: Daemon) -> None:
    with Swarm(daemon, [endless(True)] * 6) as swarm:
        wait_for("full batches", lambda: load(daemon) == (2 * BATCH, 2))
        swarm.hang_up(*[i for i, o in enumerate(swarm.outcomes) if o.text])
        wait_for("the queue moving up", lambda: load(daemon)[1] == 0)
        swarm.hang_up()
        daemon.await_idle()
    assert daemon.complete(max_tokens=3).status_code == 200
