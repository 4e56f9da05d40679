"""Engines open each other's pools on a thread: no step waits, and a move is refused until a pool is open."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.e2e import hash_engine
from tests.e2e.daemon_process import READY, ROOT, Daemon, wait_for
from tests.e2e.load_client import Clients, engines_of
from tests.e2e.mover import order_engine

SLOW_POOLS = Path(__file__).parent / "slow_pools"
SLOW = 3.0  # seconds that the pools stay closed


def test_no_step_waits_for_a_pool_and_a_move_succeeds_once_it_is_open(home: Path) -> None:
    gate = home / "open"
    environment = os.environ | {"PYTHONPATH": f"{SLOW_POOLS}:{ROOT}", "OPEN_POOLS": str(gate)}
    daemon = Daemon(home, "--stub-step", "10ms", "--rebalance-period", "100ms", engine="hash", env=environment)
    body = hash_engine.request(1, output=1500)
    try:
        daemon.await_ready_line(READY)
        wait_for("both engines", lambda: all("peer_pools" in e for e in daemon.status()["engines"]))
        with Clients(daemon, [body]) as clients:
            clients.await_tokens(1)
            name, [here] = clients.outcomes[0].id, engines_of(daemon, clients.outcomes)
            source, there = str(here), 1 - here

            refused = daemon.ctl("migrate", name, "--to", str(there))
            assert refused.returncode == 1
            assert f"engine {source} has not opened the KV pool of engine {there} yet" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
            order_engine(daemon, here, "drain")  # a standing order waits
            assert longest_pause(daemon, here, SLOW) < SLOW / 2
            assert engines_of(daemon, clients.outcomes) == [here]
            assert daemon.status()["engines"][here]["peer_pools"] == {str(there): "not_open"}
            assert f"cannot copy to engine {there} (yet)" in daemon.ctl("rebalance").stdout

            gate.touch()
            wait_for("the migration", lambda: engines_of(daemon, clients.outcomes) == [there])
            order_engine(daemon, here, "undrain")
            daemon.await_serving()
            assert daemon.ctl("migrate", name, "--to", source).returncode == 0
            wait_for("the migration back", lambda: engines_of(daemon, clients.outcomes) == [here])
            [outcome] = clients.join(60)
        assert hash_engine.exact(body, outcome)
        assert daemon.terminate(30) == 0, daemon.log
        assert f"opened the KV pool of engine {there} in" in daemon.log
    finally:
        daemon.clean_up()


def longest_pause(daemon: Daemon, engine: int, seconds: float) -> float:
    """Watch the engine's steps for `seconds`; return the longest time in which it has made none, as far as seen."""
    begin = changed = time.monotonic()
    steps, longest = -1, 0.0
    while (now := time.monotonic()) < begin + seconds:
        found = daemon.status()["engines"][engine]["steps"]
        if found != steps:
            steps, changed = found, now
        longest = max(longest, now - changed)
    return longest
