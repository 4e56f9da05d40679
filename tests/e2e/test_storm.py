"""Processes are killed at random under constant load; no answer has a wrong token, and all memory is freed."""

from __future__ import annotations

import random

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.load_client import Clients


def test_random_deaths_under_load(start: Start) -> None:
    # Little memory and short steps, so that deaths coincide with preemption, prefill and shared blocks.
    flags = ("--frontends", "2", "--devices", "cpu,cpu,cpu", "--kv-memory", "32Ki", "--stub-step", "5ms")
    daemon = start(*flags, engine="hash")
    rng = random.Random(20240711)
    served = lost = 0
    for _ in range(5):
        sent = [hash_engine.request(i, length=80, shared=48, output=90, stream=i % 4 != 0) for i in range(48)]
        with Clients(daemon, sent) as clients:
            clients.await_tokens(rng.randrange(1, 60))
            for role, index in rng.sample([("engine", 0), ("engine", 1), ("frontend", 0), ("coordinator", 0)], 2):
                daemon.kill(role, index)
            outcomes = clients.join()
        for body, outcome in zip(sent, outcomes, strict=True):
            if outcome.ok:
                assert hash_engine.exact(body, outcome)
                served += 1
            else:
                # The frontend may have died before the request was journaled.
                assert outcome.failed_cleanly or (outcome.broken and not outcome.tokens)
                assert hash_engine.exact_so_far(body, outcome)
                lost += 1
        daemon.await_serving().await_idle()
    assert served > 48  # engine 2 and frontend 1 never die
    assert daemon.metric("llumd:responses_cut_total") == 0
    sent = [hash_engine.request(i) for i in range(24)]
    with Clients(daemon, sent) as clients:
        assert all(map(hash_engine.exact, sent, clients.join()))
