"""Running requests migrate between engines, and their clients do not notice."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import count
from typing import Any

import pytest

from daemon.cli import admin_client
from daemon.cli.engine_orders import EXIT_TIMEOUT
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import HELD, Daemon, wait_for
from tests.e2e.load_client import Clients, Outcome, engines_of
from tests.e2e.mover import TAKEOVERS, RandomMover, answers, migrate, order_engine

CONCURRENCY = 32  # an engine receives only a few requests at a time, so with more in flight each would move rarely
FLAGS = ("--frontends", "2", "--stub-step", "10ms", "--no-rebalance")
THREE = ("--devices", "cpu,cpu,cpu")


@pytest.fixture(scope="module")
def trio(start_shared: Start) -> Daemon:
    return start_shared(*FLAGS, *THREE, engine="hash")


@pytest.fixture(scope="module")
def duo(start_shared: Start) -> Daemon:
    return start_shared(*FLAGS, engine="hash")


@pytest.fixture
def three(trio: Daemon) -> Daemon:
    """The daemon with three engines, once every process that an earlier test has killed is back."""
    return trio.await_serving()


@pytest.fixture
def two(duo: Daemon) -> Daemon:
    """The daemon with two engines, both serving."""
    for engine in (0, 1):
        duo.ctl("undrain", str(engine))
    return duo.await_serving()


def bodies(count: int, output: int = 200) -> list[dict[str, Any]]:
    return [hash_engine.request(i, length=100, shared=64, output=output, stream=i % 4 != 0) for i in range(count)]


def sound(body: dict[str, Any], outcome: Outcome) -> bool:
    """Return True if the answer is exact, or if it ended with a visible error and no wrong token before it."""
    failed = outcome.failed_cleanly or bool(outcome.broken)
    return hash_engine.exact(body, outcome) or (failed and hash_engine.exact_so_far(body, outcome))


def run_moved(daemon: Daemon, sent: list[dict[str, Any]], seed: int, engines: int) -> list[Outcome]:
    """Send requests and move them at random until all have ended."""
    with Clients(daemon, sent) as clients, RandomMover(daemon, seed, engines=engines):
        return clients.join()


# -- migrations


def test_random_moves_between_three_engines(three: Daemon) -> None:
    before = three.metric(TAKEOVERS)
    sent = bodies(60)
    for seed in count(1):
        assert all(map(hash_engine.exact, sent, run_moved(three, sent, seed, 3)))
        three.await_idle()
        if three.metric(TAKEOVERS) - before > 10:
            break


def test_random_moves_where_memory_is_short(start: Start) -> None:
    """The same requests are preempted, declined for lack of memory, and moved."""
    daemon = start(*FLAGS, "--kv-memory", "48Ki", engine="hash")
    sent = bodies(75, output=120)
    for seed in count(2):
        assert all(map(hash_engine.exact, sent, run_moved(daemon, sent, seed, 2)))
        daemon.await_idle()
        if daemon.metric(TAKEOVERS) > 10:  # most orders find no room
            break
    assert sum(e["preemptions"] for e in daemon.status()["engines"]) > 0


def test_each_migration_mode(two: Daemon) -> None:
    modes = ("live", "blocking", "recompute")
    sent = [hash_engine.request(i, length=200, output=300) for i in range(3)]
    before = two.metric(TAKEOVERS)
    with Clients(two, sent) as clients:
        clients.await_tokens(20)
        here = engines_of(two, clients.outcomes)
        for outcome, engine, mode in zip(clients.outcomes, here, modes, strict=True):
            migrate(two, outcome.id, 1 - engine, mode)
        wait_for("each on the other engine", lambda: engines_of(two, clients.outcomes) == [1 - e for e in here])
        assert all(map(hash_engine.exact, sent, clients.join()))
    two.await_idle()
    assert two.metric(TAKEOVERS) - before == 2  # a recomputed request is not taken over


# -- migrations and deaths


@pytest.mark.parametrize(("role", "index"), [("engine", 1), ("coordinator", 0), ("frontend", 0)])
def test_death_during_migrations(three: Daemon, role: str, index: int) -> None:
    sent = bodies(60)
    before = three.metric(TAKEOVERS)
    with Clients(three, sent) as clients, RandomMover(three, 3, engines=3):
        clients.await_tokens(1)
        wait_for("migrations", lambda: three.metric(TAKEOVERS) > before + 5)
        killed = three.kill(role, index)
        three.await_successor(role, index, killed)
        outcomes = clients.join()
    assert all(map(sound, sent, outcomes))
    whole = [hash_engine.exact(body, outcome) for body, outcome in zip(sent, outcomes, strict=True)]
    assert all(whole) or (role == "frontend" and any(whole))
    three.await_serving().await_idle()
    after = bodies(12, output=20)
    assert all(map(hash_engine.exact, after, run_moved(three, after, 4, 3)))


def test_disconnects_and_cancels_during_migrations(three: Daemon) -> None:
    rng = random.Random(5)
    leave, cancel = (rng.sample(part, 12) for part in (range(30), range(30, 60)))
    outputs = [hash_engine.ENDLESS if i in cancel else 200 for i in range(60)]
    sent = [hash_engine.request(i, length=100, shared=64, output=output) for i, output in enumerate(outputs)]
    with Clients(three, sent) as clients, RandomMover(three, 5, engines=3):
        clients.await_tokens(1)
        for left, cancelled in zip(leave, cancel, strict=True):
            clients.hang_up(left)
            admin_client.call(
                three.run_dir / "admin.sock", "DELETE", f"/v1/requests/{clients.outcomes[cancelled].id}"
            )
        outcomes = clients.join()
    for i, (body, outcome) in enumerate(zip(sent, outcomes, strict=True)):
        if i in leave:
            assert hash_engine.exact_so_far(body, outcome)
        elif i in cancel:
            assert outcome.failed_cleanly
            assert outcome.errors[0]["code"] == "cancelled"
            assert hash_engine.exact_so_far(body, outcome)
        else:
            assert hash_engine.exact(body, outcome)
    three.await_idle()


# -- migrations of a real model


def various(count: int, shortest: int) -> list[dict[str, Any]]:
    """Return greedy and seeded requests, with and without penalties, most of them with a common prefix.

    Outputs have `shortest` to `shortest` + 11 tokens.
    """
    bodies = []
    for i in range(count):
        opening = "" if i % 4 == 0 else "The lighthouse keeper wrote in his diary every night, and always began so: "
        body = {"prompt": f"{opening}Number {i}.", "max_tokens": shortest + i % 12, "logprobs": i % 4, "stream": True}
        body |= {"ignore_eos": True, "seed": i, "temperature": float(i % 3 > 0)}
        if i % 2:
            body |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}
        bodies.append(body)
    return bodies


@pytest.mark.parametrize(
    ("requests", "shortest", "max_moves", "min_takeovers", "patience"),
    [
        pytest.param(24, 16, None, 24, 60, id="24 requests"),
        pytest.param(200, 64, 10, 600, 1800, id="200 requests", marks=[pytest.mark.slow, pytest.mark.timeout(4000)]),
    ],
)
def test_models_answers_are_the_same_moved_and_unmoved(
    start: Start, requests: int, shortest: int, max_moves: int | None, min_takeovers: int, patience: float
) -> None:
    flags = ("--devices", "cpu,cpu", "--deterministic", "--no-rebalance", "--kv-memory", "512MiB")
    daemon = start(*flags, engine="model")
    sent = various(requests, shortest)
    with Clients(daemon, sent, concurrency=CONCURRENCY) as clients:
        unmoved = clients.join(patience)
    assert daemon.metric(TAKEOVERS) == 0
    assert all(outcome.ok and outcome.logprobs for outcome in unmoved)
    while (before := daemon.metric(TAKEOVERS)) <= min_takeovers:
        random_mover = RandomMover(daemon, 6, engines=2, pause=0.02, max_moves=max_moves)
        with Clients(daemon, sent, concurrency=CONCURRENCY) as clients, random_mover:
            moved = clients.join(patience)
        takeovers = daemon.metric(TAKEOVERS) - before
        print(f"{requests} requests, {takeovers:.0f} takeovers; changes of engine a request, as far as seen:")
        print(sorted(Counter(random_mover.num_moves.values()).items()))
        assert answers(moved) == answers(unmoved)
        assert len(random_mover.num_moves) == requests
    daemon.await_idle()


# -- draining


def even(daemon: Daemon) -> bool:
    """Return True if each engine runs 15 requests or more."""
    return all(e["running"] >= 15 for e in daemon.status()["engines"])


def test_drain_under_load(two: Daemon) -> None:
    sent, ending, few = bodies(40, output=hash_engine.ENDLESS), bodies(8, output=400), bodies(8, output=10)
    before = two.metric(TAKEOVERS)
    with Clients(two, sent) as clients, Clients(two, ending) as ends:
        wait_for("load on both engines", lambda: even(two))
        done = two.ctl("drain", "0", "--within", "30s", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["empty"]
        row = two.child("engine", 0)
        assert row["state"] == "draining"
        assert not any(row[name] for name in HELD)
        assert {r["engine"] for r in two.requests()} == {1}
        with Clients(two, few) as new:
            assert all(map(hash_engine.exact, few, new.join()))
        assert two.child("engine", 0)["steps"] == row["steps"]
        moved = two.metric(TAKEOVERS) - before
        assert moved >= 10

        done = two.ctl("undrain", "0")
        assert (done.returncode, done.stdout.strip()) == (0, "engine 0 serves again")
        two.await_serving()
        with Clients(two, few) as new:
            assert all(map(hash_engine.exact, few, new.join()))
        assert two.child("engine", 0)["steps"] > row["steps"]
        text = two.ctl("rebalance", "--dry-run").stdout
        assert "rebalance is off" in text
        assert "goes on moving" not in text
        assert two.metric(TAKEOVERS) - before == moved
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    two.await_idle()


def test_drain_continues_after_its_wait_times_out(two: Daemon) -> None:
    sent, ending = bodies(40, output=hash_engine.ENDLESS), bodies(8, output=300)
    with Clients(two, sent) as clients, Clients(two, ending) as ends:
        wait_for("load on both engines", lambda: even(two))
        done = two.ctl("drain", "1", "--within", "0s")
        assert done.returncode == EXIT_TIMEOUT
        assert "goes on draining" in done.stderr
        wait_for("all requests on engine 0", lambda: {r["engine"] for r in two.requests()} == {0})
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    two.await_idle()


def test_last_engine_cannot_be_drained(two: Daemon) -> None:
    assert two.ctl("drain", "1").returncode == 0
    done = two.ctl("drain", "0")
    assert done.returncode == 1
    assert "engine 0 is the last that serves" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert two.child("engine", 0)["state"] == "serving"
    assert two.complete(max_tokens=1).status_code == 200


# -- rebalancing


def explanation(daemon: Daemon, naming: str) -> str:
    """Return the text of `llumctl rebalance` if it contains `naming`. No new process, because time is short."""
    text = str(admin_client.call(daemon.run_dir / "admin.sock", "GET", "/v1/rebalance")["explanation"])
    return text if naming in text else ""


def test_rebalancing_evens_out_unequal_load(start: Start) -> None:
    daemon = start("--frontends", "2", "--stub-step", "10ms", engine="hash")
    assert daemon.ctl("drain", "1").returncode == 0
    sent = [hash_engine.request(i, length=100, output=1000) for i in range(60)]

    def running() -> list[int]:
        return [e["running"] for e in daemon.status()["engines"]]

    with Clients(daemon, sent) as clients:
        wait_for("all on engine 0", lambda: running() == [60, 0])
        order_engine(daemon, 1, "undrain")
        text = wait_for("an explanation", lambda: explanation(daemon, "to engine 1"))
        assert "engine 0: serving" in text
        assert "gives (compute)" in text
        wait_for("an even load", lambda: min(running()) >= 20)
        assert daemon.metric(TAKEOVERS) >= 15
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    daemon.await_idle()


# -- refused orders


def test_impossible_orders_are_refused(two: Daemon) -> None:
    with Clients(two, [hash_engine.request(0, output=2000)]) as clients:
        clients.await_tokens(1)
        name = clients.outcomes[0].id
        [here] = engines_of(two, clients.outcomes)
        for arguments, naming in [
            ((name, "--to", str(here)), f"on engine {here} already"),
            ((name, "--to", "7"), "no engine 7"),
            ((name, "--to", "-1"), "no engine -1"),
            ((name, "--to", "1000000"), "no engine 1000000"),
            (("cmpl-unknown", "--to", "1"), "cmpl-unknown"),
        ]:
            done = two.ctl("migrate", *arguments)
            assert done.returncode == 1
            assert naming in done.stderr
            assert len(done.stderr.splitlines()) == 1
        assert two.ctl("drain", "7").returncode == 1
        done = two.ctl("migrate", name, "--to", str(1 - here))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"to engine {1 - here}" in done.stdout
        wait_for("the migration", lambda: engines_of(two, clients.outcomes) == [1 - here])
        assert two.ctl("drain", str(here)).returncode == 0
        with pytest.raises(admin_client.Refused, match="draining"):
            migrate(two, name, here)
        assert engines_of(two, clients.outcomes) == [1 - here]
        clients.hang_up()
    two.await_idle()
