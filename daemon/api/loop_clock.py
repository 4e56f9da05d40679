"""How long the event loop is held: CPU time between two ticks, and how late a tick is.

A request must not hold the loop, because all other requests of the frontend wait meanwhile. Between two ticks the
thread of the loop uses at most their distance and the CPU time of the longest callback, under any load.
"""

from __future__ import annotations

import asyncio
import time

from daemon.ipc.metrics_page import MetricsPage

TICK = 0.01  # seconds


class LoopClock:
    """Ticks while a request is in progress, and records each tick. A context: one request."""

    def __init__(self, page: MetricsPage) -> None:
        self._page = page
        self._requests = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._cpu = 0.0

    def __enter__(self) -> LoopClock:
        self._requests += 1
        if self._timer is None:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._requests -= 1

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + TICK
        self._cpu = time.thread_time()
        self._timer = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._page.observe("event_loop_cpu_seconds", time.thread_time() - self._cpu)
        self._page.observe("event_loop_delay_seconds", max(0.0, loop.time() - self._due))
        self._timer = None
        if self._requests:
            self._start()
