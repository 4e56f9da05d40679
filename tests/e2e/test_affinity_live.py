"""Prompts that begin alike meet on one engine, but never pile up on it."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.control.policy.dispatch import AFFINITY_BOUND
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon
from tests.e2e.load_client import Swarm, engine_of

TWO = ("--frontends", "1", "--devices", "cpu,cpu", "--stub-step", "10ms", "--no-rebalance")
TURNS, TALKS = 4, 3  # an odd number of talks: by turns alone each would go from engine to engine


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared(*TWO, engine="hash")


def ask(daemon: Daemon, talk: int, turn: int) -> int:
    """One turn of a talk, answered alone; the prompt tokens that were found in the engine's cache."""
    prompt = hash_engine.prompt_of(1000 + talk, 200) + hash_engine.prompt_of(10 * talk + turn, 20)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 3, "seed": 1, "logprobs": 0}
    answer = daemon.post(body).json()
    assert answer["choices"][0]["logprobs"]["tokens"] == hash_engine.expected(body)
    daemon.await_idle()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def hits(daemon: Daemon) -> list[int]:
    """Of all turns but the first of each talk, cached tokens."""
    found = [[ask(daemon, talk, turn) for talk in range(TALKS)] for turn in range(TURNS)]
    assert found[0] == [0] * TALKS
    return [cached for turn in found[1:] for cached in turn]


def test_each_talk_stays_where_its_beginning_is(daemon: Daemon) -> None:
    assert hits(daemon) == [192] * TALKS * (TURNS - 1)


def test_without_affinity_it_does_not(start: Start) -> None:
    """Else the test above shows nothing."""
    assert 0 in hits(start(*TWO, "--no-prefix-affinity", engine="hash"))


def test_a_burst_with_one_beginning_spreads(daemon: Daemon) -> None:
    """One engine holds the beginning, or both: they get as many but for what the beginning is worth."""
    bodies = [hash_engine.request(i, length=240, shared=200, output=200) for i in range(41)]
    daemon.post(bodies[0] | {"stream": False})
    daemon.await_idle()
    with Swarm(daemon, bodies[1:]) as swarm:
        swarm.await_tokens()
        engines = engine_of(daemon, swarm.outcomes)
        outcomes = swarm.join()
    assert all(map(hash_engine.exact, bodies[1:], outcomes))
    assert abs(engines.count(0) - engines.count(1)) <= 2 * AFFINITY_BOUND
    assert -1 not in engines
