"""How steps of decodes and chunks are computed: in one pass or in two. An engine measures both when it loads.

One pass reads the weights once. But the host launches it operation by operation, with rotation, append and attention
for decodes and for chunks. In two passes a graph replays the decodes. So one pass is faster for models that wait for
their weights, and two for models that wait for the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from daemon.engine.cuda.turns import least_seconds
from daemon.engine.runner import Overlapping, StepPlan

log = logging.getLogger(__name__)

MixedSteps = Literal["one pass", "two passes"]
"""How a step of decodes and chunks is computed.

"one pass": decodes and chunks share the products, so the weights are read once. "two passes": the decodes by their
graph, then the chunks.
"""

DECODES, CHUNK = 64, 256
"""Sequences and tokens of the step that is measured: a usual one while some requests are served and others arrive."""

_ROUNDS = 3
_STEPS = 6  # per round


def measure_ways(
    runner: Overlapping,
    plan: StepPlan,
    use: Callable[[MixedSteps], None],
    *,
    in_flight: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[MixedSteps, float]:
    """Return the least seconds of a step by each way, with `in_flight` steps in flight as in serving.

    `use`: makes the runner compute the steps that it launches next in this way.
    """

    def run(way: MixedSteps) -> float:
        use(way)
        return _seconds(runner, plan, in_flight, clock)

    return least_seconds({way: partial(run, way) for way in get_args(MixedSteps)}, _ROUNDS)


def fastest_way(seconds: dict[MixedSteps, float]) -> MixedSteps:
    """Return the way with the least seconds, and log all of them."""
    fastest = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{way} {s * 1e3:.2f} ms" for way, s in seconds.items())
    log.info("steps of decodes and chunks are computed in %s: %s", fastest, times)
    return fastest


def _seconds(runner: Overlapping, plan: StepPlan, in_flight: int, clock: Callable[[], float]) -> float:
    """Return the mean seconds from one step's end to the next one's."""
    tickets: deque[Any] = deque()
    ends: list[float] = []
    for _ in range(_STEPS + in_flight):
        if len(tickets) == in_flight:
            runner.collect(tickets.popleft())
            ends.append(clock())
        tickets.append(runner.launch(plan))
    while tickets:
        runner.collect(tickets.popleft())
    return (ends[-1] - ends[0]) / (len(ends) - 1)
