"""Dispatch's peer: the same choice made by a Ray actor that holds the engines' facts, asked by actor calls.

Ray is no requirement of the project: install it into the environment (``pip install ray``) to measure this.
A lower bound of what a scheduler actor costs a request: it is asked for an engine's index and nothing else. No prompt
is sent, none journaled, and facts arrive with nobody.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from typing import Any

from daemon.control.policy.dispatch import choose
from daemon.control.policy.freeness import NOTHING
from daemon.ipc.messages import decode_engine_facts

_WARM_UP = 300  # calls


class Scheduler:
    """What runs in the actor."""

    def __init__(self, boards: list[bytes]) -> None:
        self._facts = [decode_engine_facts(board) for board in boards]
        self._in_flight = [NOTHING] * len(boards)
        self._turn = 0

    def dispatch(self) -> int | None:
        """The engine of a new request."""
        self._turn += 1
        return choose(self._facts, self._in_flight, self._turn)


def measure(boards: list[bytes], rounds: int) -> list[float]:
    """Microseconds of each call, from asking to the answer; empty where Ray is not installed.

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
