"""kill -9 and SIGSTOP under load.

A request continues to its last token. A lost request ends with an error; memory is freed.
"""

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
from tests.e2e.load_client import Clients, engines_of

RESUMES = "llumd:resumes_total"
LONG = 240  # tokens: several seconds, in which a test reads the status before it kills a process


@pytest.fixture(scope="module")
def shared(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "15ms", engine="hash")


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    """The shared daemon, once every process that an earlier test has killed is back."""
    return shared.await_serving()


def bodies(count: int, output: int = 80, **fields: Any) -> list[dict[str, Any]]:
    return [hash_engine.request(i, output=output, **fields) for i in range(count)]


def all_exact(daemon: Daemon, count: int = 12) -> bool:
    """Send `count` requests. Return True if every answer is exact."""
    sent = bodies(count, output=5)
    with Clients(daemon, sent) as clients:
        return all(map(hash_engine.exact, sent, clients.join()))


def test_requests_of_a_killed_engine_continue_on_the_other(daemon: Daemon) -> None:
    sent, resumed = bodies(16, LONG) + bodies(8, LONG, stream=False), daemon.metric(RESUMES)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(3)
        wait_for("24 requests", lambda: len(daemon.requests()) == 24)
        engines = engines_of(daemon, clients.outcomes[:16])
        before = daemon.kill("engine", 0)
        outcomes = clients.join()
    assert {0, 1} == set(engines)
    assert all(map(hash_engine.exact, sent, outcomes))
    assert daemon.metric(RESUMES) - resumed >= engines.count(0)
    assert daemon.await_successor("engine", 0, before)["restarts"] == before["restarts"] + 1
    daemon.await_serving().await_idle()
    assert all_exact(daemon)


def test_request_ends_after_too_many_engine_deaths(daemon: Daemon) -> None:
    """All other choices of its answer end with it, on whichever engine they run."""

    def first_choice() -> int:
        return next(int(row["engine"]) for row in daemon.requests() if row["id"].endswith("-0"))

    with Clients(daemon, [{"prompt": "x", "n": 4, "max_tokens": 4000, "stream": True}]) as clients:
        wait_for("choices on both engines", lambda: {row["engine"] for row in daemon.requests()} == {0, 1})
        clients.await_tokens(1)
        first = first_choice()
        daemon.kill("engine", first)
        wait_for("the first choice on the other engine", lambda: first_choice() != first)
        daemon.kill("engine", 1 - first)
        [outcome] = clients.join()
    assert outcome.failed_cleanly, outcome
    assert outcome.errors[0]["code"] == "engine_error"
    daemon.await_serving().await_idle()
    assert all_exact(daemon)


def test_requests_wait_for_the_restart_of_the_only_engine(start: Start) -> None:
    daemon = start("--stub-step", "15ms", "--devices", "cpu", engine="hash")
    sent = bodies(8)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(2)
        daemon.kill("engine", 0)
        outcomes = clients.join()
    assert all(map(hash_engine.exact, sent, outcomes))
    daemon.await_idle()


def test_without_resumes_only_the_killed_engines_requests_fail(start: Start) -> None:
    daemon = start("--stub-step", "15ms", "--max-resumes", "0", engine="hash")
    sent = bodies(16, LONG) + bodies(8, LONG, stream=False)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(3)
        wait_for("24 requests", lambda: len(daemon.requests()) == 24)
        engines = engines_of(daemon, clients.outcomes[:16])
        daemon.kill("engine", 0)
        outcomes = clients.join()
    for body, outcome, engine in zip(sent[:16], outcomes[:16], engines, strict=True):
        if engine == 1:
            assert hash_engine.exact(body, outcome)
        else:
            assert outcome.failed_cleanly, outcome
            assert outcome.errors[0]["code"] == "engine_error"
            assert hash_engine.exact_so_far(body, outcome)
    whole = [hash_engine.exact(body, outcome) for body, outcome in zip(sent[16:], outcomes[16:], strict=True)]
    lost = [outcome.failed_cleanly and outcome.status == 500 for outcome in outcomes[16:]]
    assert all(a != b for a, b in zip(whole, lost, strict=True))
    assert any(whole)
    assert any(lost)
    daemon.await_idle()


def test_all_children_killed_at_once(daemon: Daemon) -> None:
    """The supervisor is stopped meanwhile. Else a request may go on with the second engine and see its death, too."""
    begun = bodies(8, LONG)
    with Clients(daemon, begun) as clients:
        clients.await_tokens(1)
        status = daemon.status()
        daemon.process.send_signal(signal.SIGSTOP)
        for row in (*status["engines"], *status["frontends"], status["coordinator"]):
            os.kill(row["pid"], signal.SIGKILL)
        daemon.process.send_signal(signal.SIGCONT)
        outcomes = clients.join()
        assert all(map(hash_engine.exact, begun, outcomes))
        sent = bodies(8, output=5)
        with Clients(daemon, sent) as early:  # they wait in the listener queue; no engine may serve yet
            for body, outcome in zip(sent, early.join(), strict=True):
                assert outcome.status == 503 or hash_engine.exact(body, outcome)
    daemon.await_serving().await_idle()
    assert all_exact(daemon)


def test_requests_of_a_killed_frontend_continue_and_its_sibling_serves(daemon: Daemon) -> None:
    sent = bodies(24, LONG)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(3)
        owners = {row["id"].rsplit("-", 1)[0]: row["frontend"] for row in daemon.requests()}
        victim = statistics.mode(owners.values())  # the kernel may have given all connections to one frontend
        before = daemon.kill("frontend", victim)
        assert all_exact(daemon)  # on new connections, while the frontend is down
        daemon.await_successor("frontend", victim, before)
        outcomes = clients.join()
    assert all(map(hash_engine.exact, sent, outcomes))
    daemon.await_idle()
    assert all_exact(daemon)


def test_requests_of_killed_frontends_are_freed_once_their_clients_hang_up(daemon: Daemon) -> None:
    with Clients(daemon, bodies(16, output=4000)) as clients:  # these would run for a minute
        clients.await_tokens(2)
        before = [daemon.kill("frontend", k) for k in (0, 1)]
        for k in (0, 1):
            daemon.await_successor("frontend", k, before[k])
        assert len(daemon.requests()) == 16
    daemon.await_idle()


def test_connections_wait_for_the_restart_of_the_only_frontend(start: Start) -> None:
    daemon = start("--stub-step", "5ms", "--devices", "cpu", engine="hash")
    before = daemon.kill("frontend")
    sent = bodies(20, output=5)
    with Clients(daemon, sent) as clients:
        outcomes = clients.join()
    assert all(map(hash_engine.exact, sent, outcomes)), [o.broken for o in outcomes]
    assert daemon.child("frontend")["incarnation"] == before["incarnation"] + 1


def test_killed_coordinator_does_not_disturb_requests(daemon: Daemon) -> None:
    sent = bodies(12)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(2)
        before = daemon.kill("coordinator")
        assert all_exact(daemon)
        daemon.await_successor("coordinator", 0, before)
        assert all(map(hash_engine.exact, sent, clients.join()))
    assert daemon.ctl("status").returncode == 0


@pytest.mark.parametrize("role", ["engine", "frontend"])
def test_process_killed_twice_comes_back_twice(daemon: Daemon, role: str) -> None:
    for _ in range(2):
        before = daemon.kill(role, 1)
        daemon.await_successor(role, 1, before)
    daemon.await_serving()
    assert all_exact(daemon)


def test_stopped_engine_is_killed_and_restarted(start: Start) -> None:
    daemon = start("--hang-timeout", "300ms", "--stub-step", "15ms", engine="hash")
    sent = bodies(8)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(2)
        before = daemon.kill("engine", 1, signal.SIGSTOP)
        after = daemon.await_successor("engine", 1, before)
        outcomes = clients.join()
    assert "SIGKILL" in after["last_exit"]
    assert all(map(hash_engine.exact, sent, outcomes))
    daemon.await_idle()
    assert all_exact(daemon)


def test_requests_of_a_stopped_engine_continue_long_before_it_is_killed(daemon: Daemon) -> None:
    """At the defaults. The engine goes on later, and what it still sends is dropped."""
    sent = bodies(8, LONG)
    with Clients(daemon, sent) as clients:
        clients.await_tokens(2)
        before = daemon.kill("engine", 1, signal.SIGSTOP)
        try:
            outcomes = clients.join()
            assert daemon.child("engine", 1)["overdue_seconds"] > 0
            assert all_exact(daemon)
        finally:
            os.kill(before["pid"], signal.SIGCONT)
    assert all(map(hash_engine.exact, sent, outcomes))
    daemon.await_idle()
    assert daemon.child("engine", 1)["incarnation"] == before["incarnation"]


def test_all_processes_die_with_the_supervisor(home: Path, start: Start) -> None:
    first = Daemon(home).await_ready()
    try:
        processes = first.processes()
        assert len(processes) >= 5
        with Clients(first, [{"prompt": "x", "max_tokens": 4000, "stream": True}]) as clients:
            clients.await_tokens(1)
            first.process.kill()
            first.wait()
            wait_for("every process gone", lambda: not first.processes(), 2.0)
            assert clients.join()[0].broken
    finally:
        first.clean_up()
    assert not list(Path("/dev/shm").glob(f"llumd-{first.process.pid}-*"))
    assert (first.run_dir / "admin.sock").exists()  # the stale socket must not prevent a new start
    assert start().complete(max_tokens=3).status_code == 200
