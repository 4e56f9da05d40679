"""The peer of dispatch: a Ray actor that holds the engines' facts makes the same choice, one actor call a request.

The project does not require Ray: install it (``pip install ray``) to measure this. The result is a lower bound of
the cost of a scheduler actor: a call returns only an engine's index; no prompt is sent or journaled, and no facts are
updated.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from typing import Any

from daemon.control.policy.dispatch import choose
from daemon.control.policy.freeness import NONE_IN_FLIGHT
from daemon.ipc.messages import decode_engine_facts

_WARM_UP = 300  # calls


class Scheduler:
    """The class that runs as the actor."""

    def __init__(self, boards: list[bytes]) -> None:
        self._facts = [decode_engine_facts(board) for board in boards]
        self._in_flight = [NONE_IN_FLIGHT] * len(boards)
        self._turn = 0

    def dispatch(self) -> int | None:
        """Return the index of the engine for a new request."""
        self._turn += 1
        return choose(self._facts, self._in_flight, self._turn)


def measure(boards: list[bytes], rounds: int) -> list[float]:
    """Return the microseconds of each call, from call to answer; empty if Ray is not installed.

    `boards`: encoded facts of the engines.
    """
    if importlib.util.find_spec("ray") is None:
        return []
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        scheduler = ray.remote(Scheduler).remote(boards)
        times = []
        for turn in range(_WARM_UP + rounds):
            start = time.perf_counter_ns()
            ray.get(scheduler.dispatch.remote())
            if turn >= _WARM_UP:
                times.append((time.perf_counter_ns() - start) / 1e3)
        return times
    finally:
        ray.shutdown()
