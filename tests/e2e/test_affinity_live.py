"""Prefix affinity: prompts with a common prefix go to one engine, but do not overload it."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.control.policy.dispatch import AFFINITY_BOUND
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon
from tests.e2e.load_client import Clients, engines_of

TWO = ("--frontends", "1", "--devices", "cpu,cpu", "--stub-step", "10ms", "--no-rebalance")
TURNS, CHATS = 4, 3  # an odd number of chats: without affinity each would alternate between the engines


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared(*TWO, engine="hash")


def run_turn(daemon: Daemon, chat: int, turn: int) -> int:
    """Run one turn of a chat, with no other request. Return the number of cached prompt tokens."""
    prompt = hash_engine.prompt_of(1000 + chat, 200) + hash_engine.prompt_of(10 * chat + turn, 20)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 3, "seed": 1, "logprobs": 0}
    answer = daemon.post(body).json()
    assert answer["choices"][0]["logprobs"]["tokens"] == hash_engine.expected(body)
    daemon.await_idle()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def cached_tokens(daemon: Daemon) -> list[int]:
    """Return the cached tokens of all turns but the first of each chat, which have none."""
    found = [[run_turn(daemon, chat, turn) for chat in range(CHATS)] for turn in range(TURNS)]
    assert found[0] == [0] * CHATS
    return [cached for turn in found[1:] for cached in turn]


def test_each_chat_stays_on_the_engine_that_holds_its_prefix(daemon: Daemon) -> None:
    assert cached_tokens(daemon) == [192] * CHATS * (TURNS - 1)


def test_without_affinity_a_chat_changes_engines(start: Start) -> None:
    """Proves that the test above tests affinity."""
    assert 0 in cached_tokens(start(*TWO, "--no-prefix-affinity", engine="hash"))


def test_burst_with_one_prefix_spreads_over_both_engines(daemon: Daemon) -> None:
    """One engine holds the prefix, or both do: their shares differ only by what the prefix is worth."""
    bodies = [hash_engine.request(i, length=240, shared=200, output=200) for i in range(41)]
    daemon.post(bodies[0] | {"stream": False})
    daemon.await_idle()
    with Clients(daemon, bodies[1:]) as clients:
        clients.await_tokens()
        engines = engines_of(daemon, clients.outcomes)
        outcomes = clients.join()
    assert all(map(hash_engine.exact, bodies[1:], outcomes))
    assert abs(engines.count(0) - engines.count(1)) <= 2 * AFFINITY_BOUND
    assert -1 not in engines
