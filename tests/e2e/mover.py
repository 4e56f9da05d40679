"""An operator who moves running requests about without end, and what became of that."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from daemon.cli import llumctl
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Outcome, engine_of

TAKEOVERS = "llumd:takeovers_total"


class Shuffler:
    """Orders random requests to random engines until it is left. A context."""

    def __init__(
        self, daemon: Daemon, seed: int, *, engines: int, pause: float = 0.005, most: int | None = None
    ) -> None:
        """`pause`: seconds between two rounds of orders. `most`: each request is moved as often as is drawn for it
        from 0 to `most`, if it lives that long; None: no end of it."""
        self.ordered: dict[str, int] = {}  # orders by request
        self.moves: dict[str, int] = {}  # changes of engine by request, as far as they were seen
        self._wanted: dict[str, int] = {}  # by request
        self._most = most
        self._daemon = daemon
        self._chance = random.Random(seed)
        self._engines = engines
        self._pause = pause
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                self._order_some()
        except BaseException as e:
            self._failure = e

    def _order_some(self) -> None:
        try:
            rows = self._daemon.requests()
        except (llumctl.NotRunning, llumctl.Refused, TimeoutError):
            return  # the coordinator is being replaced
        self.moves |= {row["id"]: row["epoch"] - 1 for row in rows}
        rows = [row for row in rows if self._to_move(row)]
        self._chance.shuffle(rows)
        rows.sort(key=lambda row: self.ordered.get(row["id"], 0))  # nobody is left out
        for row in rows[:8]:
            if not self._stop.is_set():
                self._order(row)

    def _to_move(self, row: dict[str, Any]) -> bool:
        if self._most is None:
            return True
        return bool(row["epoch"] <= self._wanted.setdefault(row["id"], self._chance.randint(0, self._most)))

    def _order(self, row: dict[str, Any]) -> None:
        others = [e for e in range(self._engines) if e != row["engine"]]
        try:
            migrate(self._daemon, row["id"], self._chance.choice(others))
        except (llumctl.NotRunning, llumctl.Refused, TimeoutError):
            return  # ended or moved meanwhile, or one of the engines is dead
        self.ordered[row["id"]] = self.ordered.get(row["id"], 0) + 1

    def __enter__(self) -> Shuffler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(15)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


def migrate(daemon: Daemon, name: str, engine: int, how: str = "live") -> None:
    """As `llumctl migrate`, but without a process of its own. Raises llumctl.Refused."""
    llumctl.call(daemon.run_dir / "admin.sock", "POST", f"/v1/requests/{name}/migrate/{engine}?how={how}")


def order(daemon: Daemon, engine: int, verb: str) -> None:
    """As `llumctl drain`, `undrain`, `park` or `wake`, but without a process of its own, or waiting."""
    llumctl.call(daemon.run_dir / "admin.sock", "POST", f"/v1/engines/{engine}/{verb}")


def move(daemon: Daemon, outcome: Outcome, engine: int) -> None:
    """Until the request is there. An order is lost that comes when its new owner does not know of it yet."""
    ordered = -math.inf

    def there() -> bool:
        nonlocal ordered
        if engine_of(daemon, [outcome]) == [engine]:
            return True
        if time.monotonic() - ordered > 1.0:
            with suppress(llumctl.Refused):
                migrate(daemon, outcome.id, engine)
            ordered = time.monotonic()
        return False

    wait_for(f"the request on engine {engine}", there)


def answers(outcomes: Sequence[Outcome]) -> list[tuple[Any, ...]]:
    """All that the clients were told: text, tokens with their logprobs, and the reason for the end."""
    return [(o.text, o.tokens, o.logprobs, o.finish) for o in outcomes]
