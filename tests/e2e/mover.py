"""Migrations and engine orders as an operator gives them, one by one or at random."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from daemon.cli import admin_client
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Outcome, engines_of

TAKEOVERS = "llumd:takeovers_total"


class RandomMover:
    """Moves random requests to random engines on a thread of its own until the context ends."""

    def __init__(
        self, daemon: Daemon, seed: int, *, engines: int, pause: float = 0.005, max_moves: int | None = None
    ) -> None:
        """`pause`: seconds between two rounds of orders.

        `max_moves`: each request has a random limit of moves, from 0 to `max_moves`; None: no limit.
        """
        self.num_orders: dict[str, int] = {}  # by request
        self.num_moves: dict[str, int] = {}  # changes of engine by request, as far as they were seen
        self._limits: dict[str, int] = {}  # moves drawn, by request
        self._max_moves = max_moves
        self._daemon = daemon
        self._rng = random.Random(seed)
        self._engines = engines
        self._pause = pause
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                self._order_round()
        except BaseException as e:
            self._failure = e

    def _order_round(self) -> None:
        try:
            rows = self._daemon.requests()
        except (admin_client.NotRunning, admin_client.Refused, TimeoutError):
            return  # the coordinator is restarting
        self.num_moves |= {row["id"]: row["epoch"] - 1 for row in rows}
        rows = [row for row in rows if self._to_move(row)]
        self._rng.shuffle(rows)
        rows.sort(key=lambda row: self.num_orders.get(row["id"], 0))  # those with the fewest orders first
        for row in rows[:8]:
            if not self._stop.is_set():
                self._order(row)

    def _to_move(self, row: dict[str, Any]) -> bool:
        if self._max_moves is None:
            return True
        return bool(row["epoch"] <= self._limits.setdefault(row["id"], self._rng.randint(0, self._max_moves)))

    def _order(self, row: dict[str, Any]) -> None:
        others = [e for e in range(self._engines) if e != row["engine"]]
        try:
            migrate(self._daemon, row["id"], self._rng.choice(others))
        except (admin_client.NotRunning, admin_client.Refused, TimeoutError):
            return  # the request has ended or moved, or one of the engines is dead
        self.num_orders[row["id"]] = self.num_orders.get(row["id"], 0) + 1

    def __enter__(self) -> RandomMover:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(15)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


def migrate(daemon: Daemon, name: str, engine: int, how: str = "live") -> None:
    """Order a migration, as `llumctl migrate` does. Raises admin_client.Refused."""
    admin_client.call(daemon.run_dir / "admin.sock", "POST", f"/v1/requests/{name}/migrate/{engine}?how={how}")


def order_engine(daemon: Daemon, engine: int, verb: str) -> None:
    """Send `drain`, `undrain`, `park` or `wake` for an engine as `llumctl` does, but do not wait for the effect."""
    admin_client.call(daemon.run_dir / "admin.sock", "POST", f"/v1/engines/{engine}/{verb}")


def move(daemon: Daemon, outcome: Outcome, engine: int) -> None:
    """Move the request to the engine and wait until it runs there.

    The order is repeated, because an order is lost while the new owner does not know the request yet.
    """
    last_order = -math.inf

    def there() -> bool:
        nonlocal last_order
        if engines_of(daemon, [outcome]) == [engine]:
            return True
        if time.monotonic() - last_order > 1.0:
            with suppress(admin_client.Refused):
                migrate(daemon, outcome.id, engine)
            last_order = time.monotonic()
        return False

    wait_for(f"the request on engine {engine}", there)


def answers(outcomes: Sequence[Outcome]) -> list[tuple[Any, ...]]:
    """Return everything that the clients received: text, tokens with their logprobs, and the finish reason."""
    return [(o.text, o.tokens, o.logprobs, o.finish) for o in outcomes]
