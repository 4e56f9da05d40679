"""Resources of the daemon: sockets, process titles, file descriptors, memory, and shares of the frontends."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import psutil
import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients, Outcome, engines_of
from tests.e2e.mover import move

GROWTH = 8 << 20  # bytes a process may grow over a few hundred requests: allocator arenas settle, nothing leaks
MOST_OF_THE_JOURNAL = {"prompt": [5] * 4, "max_tokens": 6000, "logprobs": 20, "stream": True}  # 97 % of 1 MiB


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "10ms", engine="hash")


def test_only_the_expected_sockets_listen(daemon: Daemon) -> None:
    connections = [c for p in daemon.processes() for c in p.net_connections("all")]
    listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    assert {f"http://127.0.0.1:{port}" for port in listening} == {daemon.url}
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    named = {c.laddr for c in connections if isinstance(c.laddr, str) and c.laddr}
    assert named == {str(daemon.run_dir / "admin.sock")}


def test_admin_socket_is_not_accessible_to_others(daemon: Daemon) -> None:
    assert (daemon.run_dir / "admin.sock").stat().st_mode & 0o777 == 0o660
    assert daemon.run_dir.stat().st_mode & 0o007 == 0


def test_every_child_has_its_name_as_title(daemon: Daemon) -> None:
    titles = {p.pid: " ".join(p.cmdline()).strip() for p in daemon.processes()}
    status = daemon.status()
    assert titles[status["coordinator"]["pid"]] == "llumd: coordinator"
    for k, row in enumerate(status["frontends"]):
        assert titles[row["pid"]] == f"llumd: frontend {k}"
    for i, row in enumerate(status["engines"]):
        assert titles[row["pid"]] == f"llumd: engine {i}"


def test_frontends_share_a_burst_of_connections(daemon: Daemon) -> None:
    sent = [hash_engine.request(i, length=20, output=150) for i in range(128)]
    sent += [{"prompt": "x", "max_tokens": 10, "stream": True} for _ in range(128)]
    with Clients(daemon, sent) as clients:
        outcomes = clients.join()
    assert min(_shares(daemon, outcomes)) > 20
    assert all(map(hash_engine.exact, sent[:128], outcomes[:128]))
    assert all(outcome.ok and outcome.text for outcome in outcomes[128:])
    daemon.await_idle()


def _shares(daemon: Daemon, outcomes: list[Outcome]) -> list[int]:
    """Return how many of these requests each frontend has dispatched, by its event log (the latest 511 events)."""
    requests = {f"{outcome.id}-0" for outcome in outcomes}
    done = daemon.ctl("events", "--json", "--kind", "dispatched")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if row.get("request") in requests]
    found = Counter(row["process"] for row in rows if not row["again"])
    return [found[f"frontend {k}"] for k in range(2)]


def test_descriptors_and_memory_do_not_grow(daemon: Daemon) -> None:
    def usage() -> dict[int, tuple[int, int]]:
        return {p.pid: (p.num_fds(), p.memory_info().rss) for p in daemon.processes()}

    def settled(before: dict[int, tuple[int, int]]) -> bool:
        return all(fds <= before[pid][0] for pid, (fds, _) in usage().items())

    _burst(daemon, 300)
    _move_there_and_back(daemon)  # each engine opens the other's KV pool at the first migration and keeps it open
    before = usage()
    for _ in range(3):
        _burst(daemon, 100)
        _move_there_and_back(daemon)
    wait_for("no more descriptors than before", lambda: settled(before))
    grown = {pid: rss - before[pid][1] for pid, (_, rss) in usage().items()}
    assert max(grown.values()) < GROWTH, grown


def test_freed_journal_space_is_contiguous_again(start: Start) -> None:
    daemon = start("--journal-memory", "1MiB", "--stub-step", "1ms")
    for _ in range(3):
        _burst(daemon, 50)  # it has 64 slots
    with Clients(daemon, [MOST_OF_THE_JOURNAL]) as clients:
        clients.await_tokens(1)
        assert clients.outcomes[0].status == 200
        assert daemon.post(MOST_OF_THE_JOURNAL).status_code == 429
    daemon.await_idle()


def _move_there_and_back(daemon: Daemon) -> None:
    """Move a request to the other engine and back."""
    with Clients(daemon, [{"prompt": [5] * 40, "max_tokens": 6000, "stream": True}]) as clients:
        clients.await_tokens(1)
        (home,) = engines_of(daemon, clients.outcomes)
        for engine in (1 - home, home):
            move(daemon, clients.outcomes[0], engine)
    daemon.await_idle()


def _burst(daemon: Daemon, count: int) -> None:
    sent: list[dict[str, Any]] = [
        {"prompt": [5] * (i % 50 + 1), "max_tokens": i % 7 + 1, "stream": i % 2 == 0, "logprobs": i % 3}
        for i in range(count)
    ]
    with Clients(daemon, sent) as clients:
        assert all(outcome.ok for outcome in clients.join())
    daemon.await_idle()
