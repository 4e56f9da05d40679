"""Processes die one after another under load that never stops; in the end nothing is wrong and nothing is held."""

from __future__ import annotations

import random

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.load_client import Swarm


def test_random_deaths_under_load(start: Start) -> None:
    # Little memory and short steps, so that deaths meet preemption, prefill and shared blocks.
    flags = ("--frontends", "2", "--devices", "cpu,cpu,cpu", "--kv-memory", "32Ki", "--stub-step", "5ms")
    daemon = start(*flags, engine="hash")
    chance = random.Random(20240711)
    served = lost = 0
    for _ in range(5):
        asked = [hash_engine.request(i, length=80, shared=48, output=90, stream=i % 4 != 0) for i in range(48)]
        with Swarm(daemon, asked) as swarm:
            swarm.await_tokens(chance.randrange(1, 60))
            for role, index in chance.sample([("engine", 0), ("engine", 1), ("frontend", 0), ("coordinator", 0)], 2):
                daemon.kill(role, index)
            outcomes = swarm.join()
        for body, outcome in zip(asked, outcomes, strict=True):
            if outcome.whole:
                assert hash_engine.exact(body, outcome)
                served += 1
            else:
                assert outcome.failed_cleanly or outcome.broken
                assert hash_engine.exact_so_far(body, outcome)
                lost += 1
        daemon.await_whole().await_idle()
    assert served > 48  # engine 2 and frontend 1 never die
    assert lost > 0
    asked = [hash_engine.request(i) for i in range(24)]
    with Swarm(daemon, asked) as swarm:
        assert all(map(hash_engine.exact, asked, swarm.join()))
