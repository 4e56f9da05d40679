"""Every answer is right to the last token, whatever the memory, the batch and the engines do to it."""

from __future__ import annotations

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.load_client import Swarm


def test_preempted_and_shared_prefixes_answer_exactly(start: Start) -> None:
    # without moves: after one, what the former owner still had on its ring is stale by right
    options = ("--frontends", "2", "--kv-memory", "32Ki", "--stub-step", "10ms", "--no-rebalance")
    daemon = start(*options, engine="hash")
    bodies = [hash_engine.request(i, length=100, shared=64, output=60, stream=i % 4 != 0) for i in range(64)]
    with Swarm(daemon, bodies) as swarm:
        outcomes = swarm.join()
    wrong = [
        i
        for i, (body, outcome) in enumerate(zip(bodies, outcomes, strict=True))
        if not hash_engine.exact(body, outcome)
    ]
    assert not wrong
    daemon.await_idle()
    status = daemon.status()
    assert all(e["preemptions"] > 0 and e["steps"] > 60 for e in status["engines"])
    assert daemon.metric("vllm:prefix_cache_hits_total") >= 48 * 40  # at the least most of the shared beginning
    assert daemon.metric("llumd:stale_tokens_total") == 0
