"""kill -9 and SIGSTOP under load: requests go on to the last token wherever anybody is left to know of them, the lost
are told so, and all is freed."""

from __future__ import annotations

import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Swarm, engine_of

RESUMES = "llumd:resumes_total"
LONG = 240  # tokens: seconds, in which one looks around before something is killed


@pytest.fixture(scope="module")
def shared(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "15ms", engine="hash")


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    """With whatever an earlier test has killed back in its place."""
    return shared.await_whole()


def bodies(count: int, output: int = 80, **fields: Any) -> list[dict[str, Any]]:
    return [hash_engine.request(i, output=output, **fields) for i in range(count)]


def all_exact(daemon: Daemon, count: int = 12) -> bool:
    """Whether the daemon, as it is now, answers exactly."""
    asked = bodies(count, output=5)
    with Swarm(daemon, asked) as swarm:
        return all(map(hash_engine.exact, asked, swarm.join()))


def test_a_killed_engines_requests_go_on_elsewhere(daemon: Daemon) -> None:
    asked, resumed = bodies(16, LONG) + bodies(8, LONG, stream=False), daemon.metric(RESUMES)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(3)
        wait_for("everybody's start", lambda: len(daemon.requests()) == 24)
        engines = engine_of(daemon, swarm.outcomes[:16])
        before = daemon.kill("engine", 0)
        outcomes = swarm.join()
    assert {0, 1} == set(engines)
    assert all(map(hash_engine.exact, asked, outcomes))
    assert daemon.metric(RESUMES) - resumed >= engines.count(0)
    assert daemon.await_successor("engine", 0, before)["restarts"] == before["restarts"] + 1
    daemon.await_whole().await_idle()
    assert all_exact(daemon)


def test_a_request_that_is_there_whenever_an_engine_dies_ends(daemon: Daemon) -> None:
    """And all other choices of its answer with it, wherever they run."""

    def first_choice() -> int:
        return next(int(row["engine"]) for row in daemon.requests() if row["id"].endswith("-0"))

    with Swarm(daemon, [{"prompt": "x", "n": 4, "max_tokens": 4000, "stream": True}]) as swarm:
        wait_for("its choices on both engines", lambda: {row["engine"] for row in daemon.requests()} == {0, 1})
        swarm.await_tokens(1)
        one = first_choice()
        daemon.kill("engine", one)
        wait_for("its first choice elsewhere", lambda: first_choice() != one)
        daemon.kill("engine", 1 - one)
        [outcome] = swarm.join()
    assert outcome.failed_cleanly, outcome
    assert outcome.errors[0]["code"] == "engine_error"
    daemon.await_whole().await_idle()
    assert all_exact(daemon)


def test_requests_wait_for_the_only_engines_successor(start: Start) -> None:
    daemon = start("--stub-step", "15ms", "--devices", "cpu", engine="hash")
    asked = bodies(8)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(2)
        daemon.kill("engine", 0)
        outcomes = swarm.join()
    assert all(map(hash_engine.exact, asked, outcomes))
    daemon.await_idle()


def test_without_resumes_a_killed_engine_costs_its_own_requests(start: Start) -> None:
    daemon = start("--stub-step", "15ms", "--max-resumes", "0", engine="hash")
    asked = bodies(16, LONG) + bodies(8, LONG, stream=False)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(3)
        wait_for("everybody's start", lambda: len(daemon.requests()) == 24)
        engines = engine_of(daemon, swarm.outcomes[:16])
        daemon.kill("engine", 0)
        outcomes = swarm.join()
    for body, outcome, engine in zip(asked[:16], outcomes[:16], engines, strict=True):
        if engine == 1:
            assert hash_engine.exact(body, outcome)
        else:
            assert outcome.failed_cleanly, outcome
            assert outcome.errors[0]["code"] == "engine_error"
            assert hash_engine.exact_so_far(body, outcome)
    whole = [hash_engine.exact(body, outcome) for body, outcome in zip(asked[16:], outcomes[16:], strict=True)]
    lost = [outcome.failed_cleanly and outcome.status == 500 for outcome in outcomes[16:]]
    assert all(a != b for a, b in zip(whole, lost, strict=True))
    assert any(whole)
    assert any(lost)
    daemon.await_idle()


def test_all_children_die_at_once(daemon: Daemon) -> None:
    with Swarm(daemon, bodies(8, output=4000)) as swarm:
        swarm.await_tokens(1)
        status = daemon.status()
        for row in (*status["engines"], *status["frontends"], status["coordinator"]):
            os.kill(row["pid"], signal.SIGKILL)
        assert all(outcome.broken for outcome in swarm.join())
        asked = bodies(8, output=5)
        with Swarm(daemon, asked) as early:  # they wait in the listener, and may find no engine yet
            for body, outcome in zip(asked, early.join(), strict=True):
                assert outcome.status == 503 or hash_engine.exact(body, outcome)
    daemon.await_whole().await_idle()
    assert all_exact(daemon)


def test_killed_frontend_frees_what_it_owned_and_its_sibling_serves(daemon: Daemon) -> None:
    asked = bodies(24, LONG)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(3)
        owners = {row["id"].rsplit("-", 1)[0]: row["frontend"] for row in daemon.requests()}
        victim = statistics.mode(owners.values())  # the kernel may have given all connections to one of them
        before = daemon.kill("frontend", victim)
        assert all_exact(daemon)  # new connections meanwhile
        daemon.await_successor("frontend", victim, before)
        outcomes = swarm.join()
    for body, outcome in zip(asked, outcomes, strict=True):
        if owners[outcome.id] == victim:
            assert outcome.broken
            assert not outcome.closed
        else:
            assert hash_engine.exact(body, outcome)
    daemon.await_idle()
    assert all_exact(daemon)


def test_dropped_requests_are_freed_before_they_would_have_ended(daemon: Daemon) -> None:
    with Swarm(daemon, bodies(16, output=4000)) as swarm:  # a minute's work
        swarm.await_tokens(2)
        before = [daemon.kill("frontend", k) for k in (0, 1)]
        for k in (0, 1):
            daemon.await_successor("frontend", k, before[k])
        daemon.await_idle()


def test_connections_wait_for_the_only_frontends_successor(start: Start) -> None:
    daemon = start("--stub-step", "5ms", "--devices", "cpu", engine="hash")
    before = daemon.kill("frontend")
    asked = bodies(20, output=5)
    with Swarm(daemon, asked) as swarm:
        outcomes = swarm.join()
    assert all(map(hash_engine.exact, asked, outcomes)), [o.broken for o in outcomes]
    assert daemon.child("frontend")["incarnation"] == before["incarnation"] + 1


def test_killed_coordinator_is_not_missed(daemon: Daemon) -> None:
    asked = bodies(12)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(2)
        before = daemon.kill("coordinator")
        assert all_exact(daemon)
        daemon.await_successor("coordinator", 0, before)
        assert all(map(hash_engine.exact, asked, swarm.join()))
    assert daemon.ctl("status").returncode == 0


@pytest.mark.parametrize("role", ["engine", "frontend"])
def test_a_process_killed_again_and_again_comes_back(daemon: Daemon, role: str) -> None:
    for _ in range(2):
        before = daemon.kill(role, 1)
        daemon.await_successor(role, 1, before)
    daemon.await_whole()
    assert all_exact(daemon)


def test_silent_engine_is_killed_and_replaced(start: Start) -> None:
    daemon = start("--hang-timeout", "300ms", "--stub-step", "15ms", engine="hash")
    asked = bodies(8)
    with Swarm(daemon, asked) as swarm:
        swarm.await_tokens(2)
        before = daemon.kill("engine", 1, signal.SIGSTOP)
        after = daemon.await_successor("engine", 1, before)
        outcomes = swarm.join()
    assert "SIGKILL" in after["last_exit"]
    assert all(map(hash_engine.exact, asked, outcomes))
    daemon.await_idle()
    assert all_exact(daemon)


def test_killed_supervisor_takes_everything_with_it(home: Path, start: Start) -> None:
    first = Daemon(home).await_ready()
    try:
        family = first.family()
        assert len(family) >= 5
        with Swarm(first, [{"prompt": "x", "max_tokens": 4000, "stream": True}]) as swarm:
            swarm.await_tokens(1)
            first.process.kill()
            first.wait()
            wait_for("every process gone", lambda: not first.family(), 2.0)
            assert swarm.join()[0].broken
    finally:
        first.clean_up()
    assert not list(Path("/dev/shm").glob(f"llumd-{first.process.pid}-*"))
    assert (first.run_dir / "admin.sock").exists()  # the leftover that must not be in the way
    assert start().complete(max_tokens=3).status_code == 200
