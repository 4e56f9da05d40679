"""Engines are parked and woken, by an operator and by load, and no client sees anything of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.cli import llumctl
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Swarm
from tests.e2e.mover import order

THREE = ("--devices", "cpu,cpu,cpu", "--stub-step", "10ms", "--kv-memory", "8MiB")


@pytest.fixture(scope="module")
def trio(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--no-rebalance", *THREE, engine="hash")


@pytest.fixture
def three(trio: Daemon) -> Daemon:
    """With all engines serving."""
    for i in range(3):
        if trio.child("engine", i)["state"] != "serving":
            order(trio, i, "wake")
    return trio.await_whole()


def bodies(count: int, output: int = 200) -> list[dict[str, Any]]:
    return [hash_engine.request(i, length=100, shared=64, output=output, stream=i % 4 != 0) for i in range(count)]


def all_exact(daemon: Daemon, count: int = 12) -> bool:
    asked = bodies(count, output=5)
    with Swarm(daemon, asked) as swarm:
        return all(map(hash_engine.exact, asked, swarm.join()))


def states(daemon: Daemon) -> list[str]:
    return [e["state"] for e in daemon.status()["engines"]]


def segments(pid: int) -> set[str]:
    """The shared segments that a process holds open."""
    links = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if "llumd-" in link}


def mapped(daemon: Daemon, segment: str) -> bool:
    """Whether any process of the daemon has it in memory."""
    return any(segment in Path(f"/proc/{p.pid}/maps").read_text() for p in daemon.family())


# -- by an operator


def test_parked_under_load_and_woken(three: Daemon) -> None:
    asked, ending = bodies(45, output=hash_engine.ENDLESS), bodies(9, output=300)
    before, held = three.child("engine", 1), segments(three.process.pid)
    with Swarm(three, asked) as swarm, Swarm(three, ending) as ends:
        wait_for("work on all engines", lambda: all(e["running"] >= 8 for e in three.status()["engines"]))
        done = three.ctl("park", "1", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["parked"]
        assert not psutil.pid_exists(before["pid"])
        [pool] = wait_for("its pool closed", lambda: held - segments(three.process.pid))
        wait_for("its pool in nobody's memory", lambda: not mapped(three, pool))
        assert {r["engine"] for r in three.requests()} == {0, 2}
        assert all_exact(three)
        row = three.child("engine", 1)
        assert (row["state"], row["wished"], row["pid"]) == ("parked", "parked", None)
        assert row["restarts"] == before["restarts"]
        assert "running" not in row
        [line] = [line for line in three.ctl("status").stdout.splitlines() if line.startswith("     1  ")]
        assert line.split() == ["1", "cpu", "parked", str(before["restarts"])]
        assert 'llumd:engine_state{engine="1",state="parked"} 1.0' in three.get("/metrics").text

        done = three.ctl("wake", "1")
        assert (done.returncode, done.stdout.strip()) == (0, "engine 1 serves again")
        assert three.child("engine", 1)["incarnation"] == before["incarnation"] + 1
        three.await_whole()
        wait_for("work for it", lambda: all_exact(three) and three.child("engine", 1)["steps"] > 0)
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    three.await_idle()
    assert "ERROR" not in three.log


def test_requests_that_arrive_while_engines_come_and_go(three: Daemon) -> None:
    """Each burst finds engines in the middle of parking or of starting."""
    for engine in (0, 1, 2):
        order(three, engine, "park")
        wait_for("its sleep", lambda e=engine: all_exact(three, 24) and states(three)[e] == "parked")
        order(three, engine, "wake")
        wait_for("its return", lambda e=engine: all_exact(three, 24) and states(three)[e] == "serving")
    three.await_whole().await_idle()


def test_a_park_that_is_called_off_costs_no_process(three: Daemon) -> None:
    asked, ending = bodies(9, output=hash_engine.ENDLESS), bodies(3, output=400)
    before = three.child("engine", 2)
    with Swarm(three, asked) as swarm, Swarm(three, ending) as ends:
        wait_for("work on all engines", lambda: all(e["running"] for e in three.status()["engines"]))
        for engine in (0, 1):  # nobody could take what engine 2 runs
            order(three, engine, "drain")
        with pytest.raises(llumctl.Refused, match="last that serves"):
            order(three, 2, "park")
        for engine in (0, 1):
            assert three.ctl("undrain", str(engine)).returncode == 0
        order(three, 2, "park")
        order(three, 2, "wake")
        wait_for("its return", lambda: states(three)[2] == "serving")
        assert three.child("engine", 2)["pid"] == before["pid"]
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    assert three.await_whole().child("engine", 2)["pid"] == before["pid"]
    three.await_idle()


def test_what_is_parked_and_then_drained_sleeps_on(three: Daemon) -> None:
    assert three.ctl("park", "0").returncode == 0
    done = three.ctl("drain", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert three.child("engine", 0)["state"] == "parked"
    assert three.ctl("undrain", "0").returncode == 0
    assert three.child("engine", 0)["state"] == "serving"


def test_what_drains_goes_to_whoever_has_room_however_busy(three: Daemon) -> None:
    """The last engine ends far below the mark at which it would take anything else, and its batch full."""
    asked = [hash_engine.request(i, length=40, output=2000) for i in range(70)]
    with Swarm(three, asked) as swarm:
        wait_for("work on all engines", lambda: all(e["running"] >= 15 for e in three.status()["engines"]))
        assert three.ctl("drain", "0").returncode == 0
        order(three, 1, "drain")
        wait_for("a full batch", lambda: three.child("engine", 2)["running"] == 64)
        wait_for("the rest where it was", lambda: three.child("engine", 1)["running"] == 6)
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    three.await_idle()


# -- and deaths


def test_a_drained_engine_that_dies_comes_back_draining(three: Daemon) -> None:
    assert three.ctl("drain", "2").returncode == 0
    before = three.kill("engine", 2)

    def back() -> bool:
        row = three.child("engine", 2)
        return row["incarnation"] > before["incarnation"] and row["state"] == "draining"

    wait_for("its successor, draining", back)
    steps = three.child("engine", 2)["steps"]
    assert all_exact(three)
    assert three.child("engine", 2)["steps"] == steps
    assert three.ctl("undrain", "2").returncode == 0


def test_an_engine_that_dies_while_it_is_parked_is_not_started_again(three: Daemon) -> None:
    asked = bodies(12, output=1000)
    with Swarm(three, asked) as swarm:
        swarm.await_tokens(1)
        three.kill("engine", 1, signal.SIGSTOP)  # stopped, so that it cannot leave by itself
        order(three, 1, "park")
        three.kill("engine", 1)
        wait_for("its sleep", lambda: states(three)[1] == "parked")
        assert "died while it was to be parked" in three.log
        swarm.hang_up()
    assert all_exact(three)
    assert states(three)[1] == "parked"
    assert three.ctl("wake", "1").returncode == 0
    three.await_whole().await_idle()


def test_a_new_coordinator_wakes_what_its_predecessor_parked(three: Daemon) -> None:
    assert three.ctl("park", "1").returncode == 0
    before = three.kill("coordinator")
    three.await_successor("coordinator", 0, before)
    row = three.child("engine", 1)
    assert (row["state"], row["wished"]) == ("parked", "parked")
    assert all_exact(three)
    assert three.ctl("wake", "1").returncode == 0
    three.await_whole()


# -- by load


def test_engines_are_parked_when_idle_and_woken_under_load(start: Start) -> None:
    scaling = ("--min-engines", "1", "--max-engines", "2", "--scale-period", "500ms")
    daemon = start(*scaling, *THREE, engine="hash", whole=False)
    wait_for("all but one parked", lambda: sorted(states(daemon)) == ["parked", "parked", "serving"])
    asked = [hash_engine.request(i, length=100, output=hash_engine.ENDLESS) for i in range(60)]
    with Swarm(daemon, asked) as swarm:

        def even() -> bool:
            found = [e.get("running", 0) for e in daemon.status()["engines"]]
            return sorted(found)[1] >= 15

        wait_for("another that helps", even)
        assert states(daemon).count("serving") == 2
        assert all(map(hash_engine.exact_so_far, asked, swarm.stop()))
    wait_for("all but one parked again", lambda: sorted(states(daemon)) == ["parked", "parked", "serving"])
    assert all_exact(daemon)
    assert "is woken: 1 engines serve" in daemon.log
