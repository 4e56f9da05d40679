"""Engines are parked and woken, by an operator and by load, and no client notices."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.cli import admin_client
from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients
from tests.e2e.mover import order_engine

THREE = ("--devices", "cpu,cpu,cpu", "--stub-step", "10ms", "--kv-memory", "8MiB")


@pytest.fixture(scope="module")
def trio(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--no-rebalance", *THREE, engine="hash")


@pytest.fixture
def three(trio: Daemon) -> Daemon:
    """The daemon with three engines, all serving."""
    for i in range(3):
        if trio.child("engine", i)["state"] != "serving":
            order_engine(trio, i, "wake")
    return trio.await_serving()


def bodies(count: int, output: int = 200) -> list[dict[str, Any]]:
    return [hash_engine.request(i, length=100, shared=64, output=output, stream=i % 4 != 0) for i in range(count)]


def all_exact(daemon: Daemon, count: int = 12) -> bool:
    sent = bodies(count, output=5)
    with Clients(daemon, sent) as clients:
        return all(map(hash_engine.exact, sent, clients.join()))


def states(daemon: Daemon) -> list[str]:
    return [e["state"] for e in daemon.status()["engines"]]


def segments(pid: int) -> set[str]:
    """Return the shared segments that a process holds open."""
    links = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if "llumd-" in link}


def mapped(daemon: Daemon, segment: str) -> bool:
    """Return True if any process of the daemon maps the segment."""
    return any(segment in Path(f"/proc/{p.pid}/maps").read_text() for p in daemon.processes())


# -- by an operator


def test_park_under_load_and_wake(three: Daemon) -> None:
    sent, ending = bodies(45, output=hash_engine.ENDLESS), bodies(9, output=300)
    before, held = three.child("engine", 1), segments(three.process.pid)
    with Clients(three, sent) as clients, Clients(three, ending) as ends:
        wait_for("load on all engines", lambda: all(e["running"] >= 8 for e in three.status()["engines"]))
        done = three.ctl("park", "1", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["parked"]
        assert not psutil.pid_exists(before["pid"])
        [pool] = wait_for("its pool closed", lambda: held - segments(three.process.pid))
        wait_for("its pool unmapped in every process", lambda: not mapped(three, pool))
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
        three.await_serving()
        wait_for("load on it", lambda: all_exact(three) and three.child("engine", 1)["steps"] > 0)
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    three.await_idle()
    assert "ERROR" not in three.log


def test_requests_that_arrive_while_engines_park_and_start(three: Daemon) -> None:
    """Some bursts arrive while an engine parks, others while it starts."""
    for engine in (0, 1, 2):
        order_engine(three, engine, "park")
        wait_for("the engine parked", lambda e=engine: all_exact(three, 24) and states(three)[e] == "parked")
        order_engine(three, engine, "wake")
        wait_for("the engine serving", lambda e=engine: all_exact(three, 24) and states(three)[e] == "serving")
    three.await_serving().await_idle()


def test_park_that_is_called_off_ends_no_process(three: Daemon) -> None:
    sent, ending = bodies(9, output=hash_engine.ENDLESS), bodies(3, output=400)
    before = three.child("engine", 2)
    with Clients(three, sent) as clients, Clients(three, ending) as ends:
        wait_for("load on all engines", lambda: all(e["running"] for e in three.status()["engines"]))
        for engine in (0, 1):  # no other engine could take engine 2's requests
            order_engine(three, engine, "drain")
        with pytest.raises(admin_client.Refused, match="last that serves"):
            order_engine(three, 2, "park")
        for engine in (0, 1):
            assert three.ctl("undrain", str(engine)).returncode == 0
        order_engine(three, 2, "park")
        order_engine(three, 2, "wake")
        wait_for("the engine serving", lambda: states(three)[2] == "serving")
        assert three.child("engine", 2)["pid"] == before["pid"]
        assert all(map(hash_engine.exact, ending, ends.join()))
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    assert three.await_serving().child("engine", 2)["pid"] == before["pid"]
    three.await_idle()


def test_drain_does_not_wake_a_parked_engine(three: Daemon) -> None:
    assert three.ctl("park", "0").returncode == 0
    done = three.ctl("drain", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert three.child("engine", 0)["state"] == "parked"
    assert three.ctl("undrain", "0").returncode == 0
    assert three.child("engine", 0)["state"] == "serving"


def test_drained_requests_go_to_any_engine_with_room(three: Daemon) -> None:
    """The last engine ends with a full batch, far below the freeness at which rebalancing would choose it."""
    sent = [hash_engine.request(i, length=40, output=2000) for i in range(70)]
    with Clients(three, sent) as clients:
        wait_for("load on all engines", lambda: all(e["running"] >= 15 for e in three.status()["engines"]))
        assert three.ctl("drain", "0").returncode == 0
        order_engine(three, 1, "drain")
        wait_for("a full batch", lambda: three.child("engine", 2)["running"] == 64)
        wait_for("the other requests on engine 1", lambda: three.child("engine", 1)["running"] == 6)
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    three.await_idle()


# -- and deaths


def test_draining_engine_that_dies_restarts_draining(three: Daemon) -> None:
    assert three.ctl("drain", "2").returncode == 0
    before = three.kill("engine", 2)

    def back() -> bool:
        row = three.child("engine", 2)
        return row["incarnation"] > before["incarnation"] and row["state"] == "draining"

    wait_for("a draining successor", back)
    steps = three.child("engine", 2)["steps"]
    assert all_exact(three)
    assert three.child("engine", 2)["steps"] == steps
    assert three.ctl("undrain", "2").returncode == 0


def test_engine_that_dies_while_it_parks_is_not_restarted(three: Daemon) -> None:
    sent = bodies(12, output=1000)
    with Clients(three, sent) as clients:
        clients.await_tokens(1)
        three.kill("engine", 1, signal.SIGSTOP)  # so that it cannot exit by itself
        order_engine(three, 1, "park")
        three.kill("engine", 1)
        wait_for("the engine parked", lambda: states(three)[1] == "parked")
        assert "died before it was parked" in three.log
        clients.hang_up()
    assert all_exact(three)
    assert states(three)[1] == "parked"
    assert three.ctl("wake", "1").returncode == 0
    three.await_serving().await_idle()


def test_new_coordinator_wakes_an_engine_that_its_predecessor_parked(three: Daemon) -> None:
    assert three.ctl("park", "1").returncode == 0
    before = three.kill("coordinator")
    three.await_successor("coordinator", 0, before)
    row = three.child("engine", 1)
    assert (row["state"], row["wished"]) == ("parked", "parked")
    assert all_exact(three)
    assert three.ctl("wake", "1").returncode == 0
    three.await_serving()


# -- by load


def test_engines_are_parked_when_idle_and_woken_under_load(start: Start) -> None:
    scaling = ("--min-engines", "1", "--max-engines", "2", "--scale-period", "500ms")
    daemon = start(*scaling, *THREE, engine="hash", all_serving=False)
    wait_for("all but one parked", lambda: sorted(states(daemon)) == ["parked", "parked", "serving"])
    sent = [hash_engine.request(i, length=100, output=hash_engine.ENDLESS) for i in range(60)]
    with Clients(daemon, sent) as clients:

        def even() -> bool:
            found = [e.get("running", 0) for e in daemon.status()["engines"]]
            return sorted(found)[1] >= 15

        wait_for("load on a second engine", even)
        assert states(daemon).count("serving") == 2
        assert all(map(hash_engine.exact_so_far, sent, clients.stop()))
    wait_for("all but one parked again", lambda: sorted(states(daemon)) == ["parked", "parked", "serving"])
    assert all_exact(daemon)
    assert "is woken: 1 engines serve" in daemon.log
