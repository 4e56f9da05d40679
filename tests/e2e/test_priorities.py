"""Priorities in the real daemon: who gets in, who stays, who moves; and all choices of an answer moved together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.api.seeds import choice_seed
from daemon.cli import llumctl
from daemon.engine.fake.hash import expected_stream
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Outcome, Swarm, engine_of
from tests.e2e.mover import TAKEOVERS, Shuffler, migrate, order


@pytest.fixture(scope="module")
def single(start_shared: Start) -> Daemon:
    """One engine with two places in its batch, and memory for many."""
    return start_shared("--devices", "cpu", "--max-num-seqs", "2", "--stub-step", "10ms", engine="hash")


@pytest.fixture(scope="module")
def pair(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "10ms", "--no-rebalance", engine="hash")


def priorities(daemon: Daemon, outcomes: list[Outcome]) -> list[int]:
    shown = {row["id"].rsplit("-", 1)[0]: row["priority"] for row in daemon.requests()}
    return [shown[outcome.id] for outcome in outcomes]


def prioritise(daemon: Daemon, name: str, value: str) -> None:
    done = daemon.ctl("priority", name, value)
    assert (done.returncode, done.stderr) == (0, "")


def in_batch(daemon: Daemon) -> tuple[int, int]:
    row = daemon.child("engine", 0)
    return row["running"], row["waiting"]


# -- who gets in


def test_an_urgent_request_gets_in_at_once_where_the_batch_is_full(single: Daemon) -> None:
    asked = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in range(2)]
    with Swarm(single, asked) as swarm:
        swarm.await_tokens(5)
        urgent = hash_engine.request(2, output=20)
        with Swarm(single, [urgent | {"priority": "high"}]) as other:
            [outcome] = other.join(10)
        assert hash_engine.exact(urgent, outcome)
        assert not any(outcome.ended for outcome in swarm.outcomes)
        seen = [len(outcome.text) for outcome in swarm.outcomes]
        wait_for("both going on", lambda: all(len(o.text) > n for o, n in zip(swarm.outcomes, seen, strict=True)))
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    assert single.child("engine", 0)["preemptions"] == 1
    single.await_idle()


def test_an_operator_lets_a_waiting_request_in_and_puts_a_running_one_off(single: Daemon) -> None:
    running = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in range(2)]
    late = [hash_engine.request(i, output=hash_engine.ENDLESS) for i in (2, 3)]
    with Swarm(single, running) as first:
        first.await_tokens(5)
        with Swarm(single, late) as second:
            wait_for("two in the queue", lambda: in_batch(single) == (2, 2))
            waiting = [row["id"] for row in single.requests() if not row["output_tokens"]]
            assert len(waiting) == 2
            prioritise(single, waiting[0], "high")
            [urgent] = wait_for("one of them answered", lambda: [o for o in second.outcomes if o.text])
            [other] = [o for o in second.outcomes if o is not urgent]
            assert waiting[0].startswith(urgent.id)
            assert priorities(single, [urgent]) == [-1]

            prioritise(single, urgent.id, "5")
            prioritise(single, first.outcomes[0].id, "low")
            prioritise(single, first.outcomes[1].id, "low")
            wait_for("the last one answered", lambda: bool(other.text))
            asked = [urgent, *first.outcomes, other]
            wait_for("the last change", lambda: priorities(single, asked) == [5, 1, 1, 0])
            first.hang_up()
            second.hang_up()
            assert all(map(hash_engine.exact_so_far, running, first.join()))
            assert all(map(hash_engine.exact_so_far, late, second.join()))
    single.await_idle()


@pytest.mark.parametrize(
    ("value", "status", "naming"),
    [("high", 1, "no unfinished request is called 'cmpl-nobody'"), ("urgent", 1, "high, normal, low or a whole"),
     ("-101", 1, "from -100 to 100")],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(single: Daemon, value: str, status: int, naming: str) -> None:
    done = single.ctl("priority", "cmpl-nobody", value)
    assert done.returncode == status
    assert naming in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_key_brings_its_priority(start: Start, tmp_path: Path) -> None:
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


# -- moves


def expected(body: dict[str, Any], choice: int) -> list[str]:
    seed = choice_seed(body["seed"], choice)
    stream = expected_stream(body["prompt"], seed, body["max_tokens"], hash_engine.vocab_size())
    return [hash_engine.tokenizer().token_text(token) for token in stream]


def test_all_choices_of_an_answer_move_while_they_run(pair: Daemon) -> None:
    assert pair.ctl("drain", "1").returncode == 0
    body = hash_engine.request(0, length=100, output=500, stream=False) | {"n": 3, "priority": "high"}
    before = pair.metric(TAKEOVERS)
    with Swarm(pair, [body]) as swarm:
        wait_for("three running", lambda: [bool(r["output_tokens"]) for r in pair.requests()] == [True] * 3)
        order(pair, 1, "undrain")
        name = pair.requests()[0]["id"].rsplit("-", 1)[0]
        wait_for("engine 1 back", lambda: pair.child("engine", 1)["state"] == "serving")
        migrate(pair, name, 1)
        wait_for("all on engine 1", lambda: [r["engine"] for r in pair.requests()] == [1, 1, 1])
        prioritise(pair, name, "low")
        wait_for("all of them changed", lambda: [r["priority"] for r in pair.requests()] == [1, 1, 1])
        [outcome] = swarm.join()
    assert outcome.whole
    assert [c["logprobs"]["tokens"] for c in outcome.body["choices"]] == [expected(body, i) for i in range(3)]
    assert pair.metric(TAKEOVERS) - before == 3
    pair.await_idle()


def test_priorities_that_change_in_the_middle_of_moves(pair: Daemon) -> None:
    asked = [
        hash_engine.request(i, length=100, output=hash_engine.ENDLESS) | {"priority": i % 3 - 1} for i in range(12)
    ]
    before = pair.metric(TAKEOVERS)
    with Swarm(pair, asked) as swarm, Shuffler(pair, 7, engines=2):
        swarm.await_tokens(1)
        for value in range(1, 4):
            for outcome in swarm.outcomes:
                llumctl.call(pair.run_dir / "admin.sock", "POST", f"/v1/requests/{outcome.id}/priority/{value}")
        wait_for("the last change", lambda: priorities(pair, swarm.outcomes) == [3] * 12)
        wait_for("moves", lambda: pair.metric(TAKEOVERS) - before > 10)
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    pair.await_idle()


def test_urgent_requests_are_drained_but_not_rebalanced(start: Start) -> None:
    daemon = start("--stub-step", "10ms", engine="hash")
    assert daemon.ctl("drain", "1").returncode == 0
    asked = [hash_engine.request(i, length=100, output=hash_engine.ENDLESS) for i in range(30)]
    asked[0]["priority"] = "high"

    def running() -> list[int]:
        return [e["running"] for e in daemon.status()["engines"]]

    with Swarm(daemon, asked) as swarm:
        wait_for("all on engine 0", lambda: running() == [30, 0])
        swarm.await_tokens(1)
        prioritise(daemon, swarm.outcomes[1].id, "high")
        wait_for("the change", lambda: priorities(daemon, swarm.outcomes[:3]) == [-1, -1, 0])
        assert daemon.ctl("undrain", "1").returncode == 0
        wait_for("an even load", lambda: min(running()) >= 2 and running()[1] >= 10)
        assert engine_of(daemon, swarm.outcomes[:2]) == [0, 0]
        assert daemon.ctl("drain", "0").returncode == 0
        assert engine_of(daemon, swarm.outcomes) == [1] * 30
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    daemon.await_idle()
