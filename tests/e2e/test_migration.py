"""Requests move from engine to engine in the middle of their answers, and their clients see nothing of it."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import pytest

from daemon.cli import llumctl
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import HELD, Daemon, wait_for
from tests.e2e.load_client import Outcome, Swarm, engine_of
from tests.e2e.mover import TAKEOVERS, Shuffler, answers, migrate, order

# LLUMD_LONG=1 moves 200 requests of the model; minutes.
LONG = os.environ.get("LLUMD_LONG") == "1"
SHORTEST = 64 if LONG else 16  # tokens of a model's answer
AT_ONCE = 32  # a move takes some steps, and an engine takes in few at a time: of many at once each is moved rarely
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
    """With whatever an earlier test has killed back in its place."""
    return trio.await_whole()


@pytest.fixture
def two(duo: Daemon) -> Daemon:
    """With both engines serving."""
    for engine in (0, 1):
        duo.ctl("undrain", str(engine))
    return duo.await_whole()


def bodies(count: int, output: int = 200) -> list[dict[str, Any]]:
    return [hash_engine.request(i, length=100, shared=64, output=output, stream=i % 4 != 0) for i in range(count)]


def sound(body: dict[str, Any], outcome: Outcome) -> bool:
    """Exact, or broken off with no wrong token and with a word of it to the client."""
    told = outcome.failed_cleanly or bool(outcome.broken)
    return hash_engine.exact(body, outcome) or (told and hash_engine.exact_so_far(body, outcome))


def run_shuffled(daemon: Daemon, asked: list[dict[str, Any]], seed: int, engines: int) -> list[Outcome]:
    with Swarm(daemon, asked) as swarm, Shuffler(daemon, seed, engines=engines):
        return swarm.join()


# -- moves


def test_random_moves_between_three_engines(three: Daemon) -> None:
    before = three.metric(TAKEOVERS)
    asked = bodies(60)
    outcomes = run_shuffled(three, asked, 1, 3)
    assert all(map(hash_engine.exact, asked, outcomes))
    three.await_idle()
    assert three.metric(TAKEOVERS) - before > 10


def test_random_moves_where_memory_is_short(start: Start) -> None:
    """Preemption, refusals for want of room and moves of the same requests."""
    daemon = start(*FLAGS, "--kv-memory", "48Ki", engine="hash")
    asked = bodies(75, output=120)
    for seed in range(2, 12):
        assert all(map(hash_engine.exact, asked, run_shuffled(daemon, asked, seed, 2)))
        daemon.await_idle()
        if daemon.metric(TAKEOVERS) > 10:  # most orders find no room
            break
    assert daemon.metric(TAKEOVERS) > 10
    assert sum(e["preemptions"] for e in daemon.status()["engines"]) > 0


def test_every_way_to_move(two: Daemon) -> None:
    ways = ("live", "blocking", "recompute")
    asked = [hash_engine.request(i, length=200, output=300) for i in range(3)]
    before = two.metric(TAKEOVERS)
    with Swarm(two, asked) as swarm:
        swarm.await_tokens(20)
        here = engine_of(two, swarm.outcomes)
        for outcome, engine, how in zip(swarm.outcomes, here, ways, strict=True):
            migrate(two, outcome.id, 1 - engine, how)
        wait_for("each on the other engine", lambda: engine_of(two, swarm.outcomes) == [1 - e for e in here])
        assert all(map(hash_engine.exact, asked, swarm.join()))
    two.await_idle()
    assert two.metric(TAKEOVERS) - before == 2  # what is computed anew is not taken over


# -- moves and deaths


@pytest.mark.parametrize(("role", "index"), [("engine", 1), ("coordinator", 0), ("frontend", 0)])
def test_death_in_the_middle_of_moves(three: Daemon, role: str, index: int) -> None:
    asked = bodies(60)
    before = three.metric(TAKEOVERS)
    with Swarm(three, asked) as swarm, Shuffler(three, 3, engines=3):
        swarm.await_tokens(1)
        wait_for("moves", lambda: three.metric(TAKEOVERS) > before + 5)
        killed = three.kill(role, index)
        three.await_successor(role, index, killed)
        outcomes = swarm.join()
    assert all(map(sound, asked, outcomes))
    whole = [hash_engine.exact(body, outcome) for body, outcome in zip(asked, outcomes, strict=True)]
    assert all(whole) or (role == "frontend" and any(whole))
    three.await_whole().await_idle()
    after = bodies(12, output=20)
    assert all(map(hash_engine.exact, after, run_shuffled(three, after, 4, 3)))


def test_disconnects_and_cancels_in_the_middle_of_moves(three: Daemon) -> None:
    chance = random.Random(5)
    leave, cancel = (chance.sample(part, 12) for part in (range(30), range(30, 60)))
    outputs = [hash_engine.ENDLESS if i in cancel else 200 for i in range(60)]
    asked = [hash_engine.request(i, length=100, shared=64, output=output) for i, output in enumerate(outputs)]
    with Swarm(three, asked) as swarm, Shuffler(three, 5, engines=3):
        swarm.await_tokens(1)
        for left, cancelled in zip(leave, cancel, strict=True):
            swarm.hang_up(left)
            llumctl.call(three.run_dir / "admin.sock", "DELETE", f"/v1/requests/{swarm.outcomes[cancelled].id}")
        outcomes = swarm.join()
    for i, (body, outcome) in enumerate(zip(asked, outcomes, strict=True)):
        if i in leave:
            assert hash_engine.exact_so_far(body, outcome)
        elif i in cancel:
            assert outcome.failed_cleanly
            assert outcome.errors[0]["code"] == "cancelled"
            assert hash_engine.exact_so_far(body, outcome)
        else:
            assert hash_engine.exact(body, outcome)
    three.await_idle()


# -- moves of a real model


def various(count: int) -> list[dict[str, Any]]:
    """Greedy and seeded, with and without penalties, most with a common beginning."""
    bodies = []
    for i in range(count):
        opening = "" if i % 4 == 0 else "The lighthouse keeper wrote in his diary every night, and always began so: "
        body = {"prompt": f"{opening}Number {i}.", "max_tokens": SHORTEST + i % 12, "logprobs": i % 4, "stream": True}
        body |= {"ignore_eos": True, "seed": i, "temperature": float(i % 3 > 0)}
        if i % 2:
            body |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}
        bodies.append(body)
    return bodies


@pytest.mark.timeout(4000 if LONG else 180)
def test_a_models_answers_are_the_same_moved_and_unmoved(start: Start) -> None:
    flags = ("--devices", "cpu,cpu", "--deterministic", "--no-rebalance", "--kv-memory", "512MiB")
    daemon = start(*flags, engine="model")
    count, most = (200, 10) if LONG else (24, None)
    asked = various(count)
    with Swarm(daemon, asked, at_once=AT_ONCE) as swarm:
        unmoved = swarm.join(1800 if LONG else 60)
    assert daemon.metric(TAKEOVERS) == 0
    shuffler = Shuffler(daemon, 6, engines=2, pause=0.02, most=most)
    with Swarm(daemon, asked, at_once=AT_ONCE) as swarm, shuffler:
        moved = swarm.join(1800 if LONG else 60)
    takeovers = daemon.metric(TAKEOVERS)
    print(f"{count} requests, {takeovers:.0f} takeovers; changes of engine a request, as far as seen:")
    print(sorted(Counter(shuffler.moves.values()).items()))
    assert all(outcome.whole and outcome.logprobs for outcome in unmoved)
    assert answers(moved) == answers(unmoved)
    assert len(shuffler.moves) == count
    assert takeovers > (3 * count if LONG else count)
    daemon.await_idle()


# -- draining


def even(daemon: Daemon) -> bool:
    return all(e["running"] >= 15 for e in daemon.status()["engines"])


def test_drain_under_load(two: Daemon) -> None:
    asked, ending, few = bodies(40, output=hash_engine.ENDLESS), bodies(8, output=400), bodies(8, output=10)
    before = two.metric(TAKEOVERS)
    with Swarm(two, asked) as swarm, Swarm(two, ending) as ends:
        wait_for("work on both engines", lambda: even(two))
        done = two.ctl("drain", "0", "--within", "30s", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["empty"]
        row = two.child("engine", 0)
        assert row["state"] == "draining"
        assert not any(row[name] for name in HELD)
        assert {r["engine"] for r in two.requests()} == {1}
        with Swarm(two, few) as new:
            assert all(map(hash_engine.exact, few, new.join()))
        assert two.child("engine", 0)["steps"] == row["steps"]
        moved = two.metric(TAKEOVERS) - before
        assert moved >= 10

        done = two.ctl("undrain", "0")
        assert (done.returncode, done.stdout.strip()) == (0, "engine 0 serves again")
        two.await_whole()
        with Swarm(two, few) as new:
            assert all(map(hash_engine.exact, few, new.join()))
        assert two.child("engine", 0)["steps"] > row["steps"]
        said = two.ctl("rebalance", "--dry-run").stdout
        assert "rebalance is off" in said
        assert "goes on moving" not in said
        assert two.metric(TAKEOVERS) - before == moved
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    two.await_idle()


def test_drain_goes_on_when_nobody_waits_for_it(two: Daemon) -> None:
    asked, ending = bodies(40, output=hash_engine.ENDLESS), bodies(8, output=300)
    with Swarm(two, asked) as swarm, Swarm(two, ending) as ends:
        wait_for("work on both engines", lambda: even(two))
        done = two.ctl("drain", "1", "--within", "0s")
        assert done.returncode == llumctl.EXIT_TIMEOUT
        assert "goes on draining" in done.stdout
        wait_for("everybody on engine 0", lambda: {r["engine"] for r in two.requests()} == {0})
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    two.await_idle()


def test_the_last_engine_cannot_be_drained(two: Daemon) -> None:
    assert two.ctl("drain", "1").returncode == 0
    done = two.ctl("drain", "0")
    assert done.returncode == 1
    assert "engine 0 is the last that serves" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert two.child("engine", 0)["state"] == "serving"
    assert two.complete(max_tokens=1).status_code == 200


# -- rebalancing


def reasons(daemon: Daemon, naming: str) -> str:
    """What `llumctl rebalance` would say now, if it speaks of `naming`. Without a process: there is little time."""
    said = str(llumctl.call(daemon.run_dir / "admin.sock", "GET", "/v1/rebalance")["explanation"])
    return said if naming in said else ""


def test_unequal_load_evens_out_by_itself(start: Start) -> None:
    daemon = start("--frontends", "2", "--stub-step", "10ms", engine="hash")
    assert daemon.ctl("drain", "1").returncode == 0
    asked = [hash_engine.request(i, length=100, output=1000) for i in range(60)]

    def running() -> list[int]:
        return [e["running"] for e in daemon.status()["engines"]]

    with Swarm(daemon, asked) as swarm:
        wait_for("all on engine 0", lambda: running() == [60, 0])
        order(daemon, 1, "undrain")
        said = wait_for("a reason", lambda: reasons(daemon, "to engine 1"))
        assert "engine 0: serving" in said
        assert "gives (compute)" in said
        wait_for("an even load", lambda: min(running()) >= 20)
        assert daemon.metric(TAKEOVERS) >= 15
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    daemon.await_idle()


# -- what cannot be done


def test_orders_that_make_no_sense_are_refused(two: Daemon) -> None:
    with Swarm(two, [hash_engine.request(0, output=2000)]) as swarm:
        swarm.await_tokens(1)
        name = swarm.outcomes[0].id
        [here] = engine_of(two, swarm.outcomes)
        for arguments, naming in [
            ((name, "--to", str(here)), f"on engine {here} already"),
            ((name, "--to", "7"), "no engine 7"),
            ((name, "--to", "-1"), "no engine -1"),
            ((name, "--to", "1000000"), "no engine 1000000"),
            (("cmpl-nobody", "--to", "1"), "cmpl-nobody"),
        ]:
            done = two.ctl("migrate", *arguments)
            assert done.returncode == 1
            assert naming in done.stderr
            assert len(done.stderr.splitlines()) == 1
        assert two.ctl("drain", "7").returncode == 1
        done = two.ctl("migrate", name, "--to", str(1 - here))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"to engine {1 - here}" in done.stdout
        wait_for("the move", lambda: engine_of(two, swarm.outcomes) == [1 - here])
        assert two.ctl("drain", str(here)).returncode == 0
        with pytest.raises(llumctl.Refused, match="draining"):
            migrate(two, name, here)
        assert engine_of(two, swarm.outcomes) == [1 - here]
        swarm.hang_up()
    two.await_idle()
