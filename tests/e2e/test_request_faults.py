"""A request that makes its engine raise: it ends with an error, and the streams beside it do not notice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import ROOT, Daemon
from tests.e2e.faults.sitecustomize import BREAKS, RAISES
from tests.e2e.load_client import Clients

FAULTS = Path(__file__).parent / "faults"


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    """Two engines with the faults of `tests/e2e/faults`."""
    environment = os.environ | {"PYTHONPATH": f"{FAULTS}:{ROOT}"}
    flags = ("--stub-step", "15ms", "--max-resumes", "3")
    return start_shared(*flags, engine="hash", env=environment, tracebacks=True)


def guilty(first: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": [first, 5, 6], "max_tokens": 5, **fields}


def test_a_request_that_raises_ends_alone(daemon: Daemon) -> None:
    sent = [hash_engine.request(i, output=60) for i in range(8)]
    before = daemon.status()["engines"]
    with Clients(daemon, sent) as clients:
        clients.await_tokens(1)
        for _ in range(4):  # both engines meet it
            answer = daemon.post(guilty(RAISES))
            assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
            assert answer.json()["error"]["code"] == "engine_error"
        with Clients(daemon, [guilty(RAISES, stream=True)]) as streams:
            assert streams.join()[0].failed_cleanly
        outcomes = clients.join()
    assert all(map(hash_engine.exact, sent, outcomes))
    after = daemon.status()["engines"]
    assert [e["incarnation"] for e in after] == [e["incarnation"] for e in before]
    daemon.await_idle()


@pytest.mark.parametrize("penalty", [1e-46, 1e-300])
def test_a_number_that_is_zero_as_float32_is_refused(daemon: Daemon, penalty: float) -> None:
    answer = daemon.complete(max_tokens=2, repetition_penalty=penalty)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "repetition_penalty")


def test_a_request_that_breaks_engines_is_not_tried_on_a_third(daemon: Daemon) -> None:
    """Though `max_resumes` allows it. Both engines come back, and serve."""
    before = [daemon.child("engine", i) for i in (0, 1)]
    answer = daemon.post(guilty(BREAKS))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    assert "2 engines failed" in answer.json()["error"]["message"]
    for i in (0, 1):
        after = daemon.await_successor("engine", i, before[i])
        assert after["restarts"] == before[i]["restarts"] + 1
    daemon.await_serving().await_idle()
    body = hash_engine.request(1, output=5)
    with Clients(daemon, [body]) as clients:
        assert hash_engine.exact(body, clients.join()[0])
