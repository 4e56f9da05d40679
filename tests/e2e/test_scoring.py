"""Prompts that are scored through everything that may happen meanwhile: each logprob is correct, and comes once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients
from tests.e2e.mover import TAKEOVERS, RandomMover

LENGTH = 900  # tokens of a prompt, of which a step computes 32


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Iterator[Daemon]:
    return start_shared("--stub-step", "20ms", "--no-rebalance", "--max-batch-tokens", "32", engine="hash")


def bodies() -> list[dict]:
    """Two requests that only score, and two that go on to decode."""
    outputs = enumerate((0, 0, 200, 200))
    return [hash_engine.request(i, length=LENGTH, output=n, stream=i % 2 == 0, echo=True) for i, n in outputs]


def begun(daemon: Daemon) -> bool:
    """Return True once each engine has computed a part of a prompt."""
    return all(engine["steps"] >= 8 for engine in daemon.status()["engines"])


def check(daemon: Daemon, harm: Callable[[], None]) -> None:
    """Send the requests, let `harm` happen while they are scored, and check every answer."""
    daemon.await_serving()
    before = daemon.metric("vllm:prompt_tokens_total")
    sent = bodies()
    with Clients(daemon, sent) as clients:
        wait_for("prompts", lambda: daemon.metric("vllm:prompt_tokens_total") > before + 200)
        harm()
        outcomes = clients.join()
    assert [hash_engine.exact(body, outcome) for body, outcome in zip(sent, outcomes, strict=True)] == [True] * 4
    daemon.await_idle()


def test_the_frontend_dies(daemon: Daemon) -> None:
    check(daemon, lambda: os.kill(daemon.status()["frontends"][0]["pid"], signal.SIGKILL))


def test_an_engine_dies(daemon: Daemon) -> None:
    check(daemon, lambda: os.kill(daemon.status()["engines"][0]["pid"], signal.SIGKILL))


def test_requests_move(daemon: Daemon) -> None:
    """They move once their prompt is scored: before that, the order to move waits."""
    daemon.await_serving()
    before = daemon.metric(TAKEOVERS)
    sent = bodies()
    with Clients(daemon, sent) as clients, RandomMover(daemon, 1, engines=2):
        outcomes = clients.join()
    assert all(map(hash_engine.exact, sent, outcomes))
    assert daemon.metric(TAKEOVERS) > before
    daemon.await_idle()


def test_an_engine_is_drained(daemon: Daemon) -> None:
    check(daemon, lambda: daemon.ctl("drain", "0"))
    daemon.ctl("undrain", "0")
