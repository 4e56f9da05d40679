"""What the daemon takes of its machine: sockets, names, descriptors, memory; and how it shares its load."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Swarm, engine_of
from tests.e2e.mover import move

GROWTH = 8 << 20  # bytes a process may grow by over a few hundred requests: arenas settle, nothing accumulates
MOST_OF_THE_JOURNAL = {"prompt": [5] * 4, "max_tokens": 6000, "logprobs": 20, "stream": True}  # 97 % of 1 MiB


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "10ms", engine="hash")


def test_only_the_expected_sockets_listen(daemon: Daemon) -> None:
    connections = [c for p in daemon.family() for c in p.net_connections("all")]
    listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    assert {f"http://127.0.0.1:{port}" for port in listening} == {daemon.url}
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    named = {c.laddr for c in connections if isinstance(c.laddr, str) and c.laddr}
    assert named == {str(daemon.run_dir / "admin.sock")}


def test_admin_socket_is_closed_to_others(daemon: Daemon) -> None:
    assert (daemon.run_dir / "admin.sock").stat().st_mode & 0o777 == 0o660
    assert daemon.run_dir.stat().st_mode & 0o007 == 0


def test_every_child_says_what_it_is(daemon: Daemon) -> None:
    titles = {p.pid: " ".join(p.cmdline()).strip() for p in daemon.family()}
    status = daemon.status()
    assert titles[status["coordinator"]["pid"]] == "llumd: coordinator"
    for k, row in enumerate(status["frontends"]):
        assert titles[row["pid"]] == f"llumd: frontend {k}"
    for i, row in enumerate(status["engines"]):
        assert titles[row["pid"]] == f"llumd: engine {i}"


def test_frontends_share_a_burst_of_connections(daemon: Daemon) -> None:
    asked = [hash_engine.request(i, length=20, output=150) for i in range(128)]
    asked += [{"prompt": "x", "max_tokens": 10, "stream": True} for _ in range(128)]
    with Swarm(daemon, asked) as swarm:
        shares = wait_for("a part of it for each", lambda: _shares(daemon))
        outcomes = swarm.join()
    assert min(shares) > 20
    assert all(map(hash_engine.exact, asked[:128], outcomes[:128]))
    assert all(outcome.whole and outcome.text for outcome in outcomes[128:])
    daemon.await_idle()


def _shares(daemon: Daemon) -> list[int] | None:
    active = [f["active"] for f in daemon.status()["frontends"]]
    return active if sum(active) > 100 and min(active) > 20 else None


def test_nothing_accumulates(daemon: Daemon) -> None:
    def use() -> dict[int, tuple[int, int]]:
        return {p.pid: (p.num_fds(), p.memory_info().rss) for p in daemon.family()}

    def settled(before: dict[int, tuple[int, int]]) -> bool:
        return all(fds <= before[pid][0] for pid, (fds, _) in use().items())

    _burst(daemon, 300)
    _there_and_back(daemon)  # at the first move between two engines each opens the other's KV pool, for good
    before = use()
    for _ in range(3):
        _burst(daemon, 100)
        _there_and_back(daemon)
    wait_for("no more descriptors than before", lambda: settled(before))
    grown = {pid: rss - before[pid][1] for pid, (_, rss) in use().items()}
    assert max(grown.values()) < GROWTH, grown


def test_the_journal_is_free_again_in_one_piece(start: Start) -> None:
    daemon = start("--journal-memory", "1MiB", "--stub-step", "1ms")
    for _ in range(3):
        _burst(daemon, 50)  # it has 64 slots
    with Swarm(daemon, [MOST_OF_THE_JOURNAL]) as swarm:
        swarm.await_tokens(1)
        assert swarm.outcomes[0].status == 200
        assert daemon.post(MOST_OF_THE_JOURNAL).status_code == 429
    daemon.await_idle()


def _there_and_back(daemon: Daemon) -> None:
    """A request goes over to the other engine and comes home."""
    with Swarm(daemon, [{"prompt": [5] * 40, "max_tokens": 6000, "stream": True}]) as swarm:
        swarm.await_tokens(1)
        (home,) = engine_of(daemon, swarm.outcomes)
        for engine in (1 - home, home):
            move(daemon, swarm.outcomes[0], engine)
    daemon.await_idle()


def _burst(daemon: Daemon, count: int) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": [5] * (i % 50 + 1), "max_tokens": i % 7 + 1, "stream": i % 2 == 0, "logprobs": i % 3}
        for i in range(count)
    ]
    with Swarm(daemon, asked) as swarm:
        assert all(outcome.whole for outcome in swarm.join())
    daemon.await_idle()
