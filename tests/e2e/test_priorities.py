"""Priorities in the real daemon: admission to the batch, preemption, migration; and answers with several choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.api.params import choice_seed
from daemon.cli import admin_client
from daemon.engine.fake.hash import expected_stream
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients, Outcome, engines_of
from tests.e2e.mover import TAKEOVERS, RandomMover, migrate, order_engine


@pytest.fixture(scope="module")
def single(start_shared: Start) -> Daemon:
    """A daemon with one engine: a batch of two requests, and memory for many."""
    return start_shared("--devices", "cpu", "--max-num-seqs", "2", "--stub-step", "10ms", engine="hash")


@pytest.fixture(scope="module")
def pair(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "10ms", "--no-rebalance", engine="hash")


def priorities(daemon: Daemon, outcomes: list[Outcome]) -> list[int]:
    """Return the priorities of these requests, as `llumctl requests` shows them."""
    shown = {row["id"].rsplit("-", 1)[0]: row["priority"] for row in daemon.requests()}
    return [shown[outcome.id] for outcome in outcomes]


def set_priority(daemon: Daemon, name: str, value: str) -> None:
    done = daemon.ctl("priority", name, value)
    assert (done.returncode, done.stderr) == (0, "")


def num_requests(daemon: Daemon) -> tuple[int, int]:
    """Return (running, waiting) of engine 0."""
    row = daemon.child("engine", 0)
    return row["running"], row["waiting"]


# -- admission


def test_urgent_request_enters_a_full_batch_at_once(single: Daemon) -> None:
    sent = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in range(2)]
    with Clients(single, sent) as clients:
        clients.await_tokens(5)
        urgent = hash_engine.request(2, output=20)
        with Clients(single, [urgent | {"priority": "high"}]) as other:
            [outcome] = other.join(10)
        assert hash_engine.exact(urgent, outcome)
        assert not any(outcome.ended for outcome in clients.outcomes)
        seen = [len(outcome.text) for outcome in clients.outcomes]
        wait_for(
            "output of both other requests",
            lambda: all(len(o.text) > n for o, n in zip(clients.outcomes, seen, strict=True)),
        )
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    assert single.child("engine", 0)["preemptions"] == 1
    single.await_idle()


def test_new_priority_admits_a_waiting_request_and_preempts_a_running_one(single: Daemon) -> None:
    running = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in range(2)]
    late = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in (2, 3)]
    with Clients(single, running) as first:
        first.await_tokens(5)
        with Clients(single, late) as second:
            wait_for("two in the queue", lambda: num_requests(single) == (2, 2))
            waiting = [row["id"] for row in single.requests() if not row["output_tokens"]]
            assert len(waiting) == 2
            set_priority(single, waiting[0], "high")
            [urgent] = wait_for("output of one of them", lambda: [o for o in second.outcomes if o.text])
            [other] = [o for o in second.outcomes if o is not urgent]
            assert waiting[0].startswith(urgent.id)
            assert priorities(single, [urgent]) == [-1]

            set_priority(single, urgent.id, "5")
            set_priority(single, first.outcomes[0].id, "low")
            set_priority(single, first.outcomes[1].id, "low")
            wait_for("output of the last one", lambda: bool(other.text))
            sent = [urgent, *first.outcomes, other]
            wait_for("the last change", lambda: priorities(single, sent) == [5, 1, 1, 0])
            first.hang_up()
            second.hang_up()
            assert all(map(hash_engine.exact_so_far, running, first.join()))
            assert all(map(hash_engine.exact_so_far, late, second.join()))
    single.await_idle()


@pytest.mark.parametrize(
    ("value", "status", "naming"),
    [("high", 1, "no unfinished request is called 'cmpl-unknown'"), ("urgent", 1, "high, normal, low or a whole"),
     ("-101", 1, "from -100 to 100")],
)  # fmt: skip
def test_invalid_priority_or_request_is_refused(single: Daemon, value: str, status: int, naming: str) -> None:
    done = single.ctl("priority", "cmpl-unknown", value)
    assert done.returncode == status
    assert naming in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_api_key_sets_the_priority(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("boss priority=high\nclerk\n")
    flags = ("--devices", "cpu", "--stub-step", "10ms", "--api-key-file", str(keys))
    daemon = start(*flags, engine="hash", key="clerk")
    body = hash_engine.request(0, output=hash_engine.ENDLESS)
    shown = {}
    for key, fields in (("boss", {}), ("clerk", {}), ("boss", {"priority": 3})):
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body | fields, headers=headers) as response:
            assert response.status_code == 200
            [row] = wait_for("the request", daemon.requests)
            shown[key, len(fields)] = row["priority"]
        daemon.await_idle()
    assert shown == {("boss", 0): -1, ("clerk", 0): 0, ("boss", 1): 3}


# -- migrations


def expected(body: dict[str, Any], choice: int) -> list[str]:
    """Return the token texts of the only correct answer of one choice."""
    seed = choice_seed(body["seed"], choice)
    stream = expected_stream(body["prompt"], seed, body["max_tokens"], hash_engine.vocab_size())
    return [hash_engine.tokenizer().token_text(token) for token in stream]


def test_all_choices_of_an_answer_migrate_while_they_run(pair: Daemon) -> None:
    assert pair.ctl("drain", "1").returncode == 0
    body = hash_engine.request(0, length=100, output=500, stream=False) | {"n": 3, "priority": "high"}
    before = pair.metric(TAKEOVERS)
    with Clients(pair, [body]) as clients:
        wait_for("three running", lambda: [bool(r["output_tokens"]) for r in pair.requests()] == [True] * 3)
        order_engine(pair, 1, "undrain")
        name = pair.requests()[0]["id"].rsplit("-", 1)[0]
        wait_for("engine 1 back", lambda: pair.child("engine", 1)["state"] == "serving")
        migrate(pair, name, 1)
        wait_for("all on engine 1", lambda: [r["engine"] for r in pair.requests()] == [1, 1, 1])
        set_priority(pair, name, "low")
        wait_for("all of them changed", lambda: [r["priority"] for r in pair.requests()] == [1, 1, 1])
        [outcome] = clients.join()
    assert outcome.ok
    assert [c["logprobs"]["tokens"] for c in outcome.body["choices"]] == [expected(body, i) for i in range(3)]
    assert pair.metric(TAKEOVERS) - before == 3
    pair.await_idle()


def test_priorities_change_during_migrations(pair: Daemon) -> None:
    sent = [
        hash_engine.request(i, length=100, output=hash_engine.ENDLESS) | {"priority": i % 3 - 1} for i in range(12)
    ]
    before = pair.metric(TAKEOVERS)
    with Clients(pair, sent) as clients, RandomMover(pair, 7, engines=2):
        clients.await_tokens(1)
        for value in range(1, 4):
            for outcome in clients.outcomes:
                admin_client.call(pair.run_dir / "admin.sock", "POST", f"/v1/requests/{outcome.id}/priority/{value}")
        wait_for("the last change", lambda: priorities(pair, clients.outcomes) == [3] * 12)
        wait_for("migrations", lambda: pair.metric(TAKEOVERS) - before > 10)
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    pair.await_idle()


def test_urgent_requests_are_drained_but_not_rebalanced(start: Start) -> None:
    daemon = start("--stub-step", "10ms", engine="hash")
    assert daemon.ctl("drain", "1").returncode == 0
    sent = [hash_engine.request(i, length=100, output=hash_engine.ENDLESS) for i in range(30)]
    sent[0]["priority"] = "high"

    def running() -> list[int]:
        return [e["running"] for e in daemon.status()["engines"]]

    with Clients(daemon, sent) as clients:
        wait_for("all on engine 0", lambda: running() == [30, 0])
        clients.await_tokens(1)
        set_priority(daemon, clients.outcomes[1].id, "high")
        wait_for("the change", lambda: priorities(daemon, clients.outcomes[:3]) == [-1, -1, 0])
        assert daemon.ctl("undrain", "1").returncode == 0
        wait_for("an even load", lambda: min(running()) >= 2 and running()[1] >= 10)
        assert engines_of(daemon, clients.outcomes[:2]) == [0, 0]
        assert daemon.ctl("drain", "0").returncode == 0
        assert engines_of(daemon, clients.outcomes) == [1] * 30
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    daemon.await_idle()
