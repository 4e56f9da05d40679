"""Every answer is correct to the last token under preemption, prefix sharing and batching."""

from __future__ import annotations

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.load_client import Clients


def test_preemption_and_shared_prefixes_keep_answers_exact(start: Start) -> None:
    # No rebalancing: after a migration the output that the former owner still has on its ring counts as stale.
    options = ("--frontends", "2", "--kv-memory", "32Ki", "--stub-step", "10ms", "--no-rebalance")
    daemon = start(*options, engine="hash")
    bodies = [hash_engine.request(i, length=100, shared=64, output=60, stream=i % 4 != 0) for i in range(64)]
    for output in (9, 0):  # their prompts are scored
        fields = {"length": 100, "shared": 64, "output": output, "echo": True}
        bodies += [hash_engine.request(i, stream=i % 2 == 0, **fields) for i in range(16)]
    with Clients(daemon, bodies) as clients:
        outcomes = clients.join()
    wrong = [
        i
        for i, (body, outcome) in enumerate(zip(bodies, outcomes, strict=True))
        if not hash_engine.exact(body, outcome)
    ]
    assert not wrong
    daemon.await_idle()
    status = daemon.status()
    assert all(e["preemptions"] > 0 and e["steps"] > 60 for e in status["engines"])
    assert daemon.metric("vllm:prefix_cache_hits_total") >= 48 * 40  # at least most of the shared prefix
    assert daemon.metric("llumd:stale_tokens_total") == 0
