"""The steps under way: each is launched, collected and folded in turn, the next one launched before the last is
collected where the runner can do that. So a device never waits for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from daemon.engine.runner import Overlapping, Runner, StepPlan, StepResult


class Step(NamedTuple):
    """One that has ended. `seconds`: since its launch or, if that was later, the end of the one before."""

    plan: StepPlan
    result: StepResult
    seconds: float


class Pipeline:
    """Between scheduler and runner. With `overlap`, a runner that can is given a step beforehand."""

    def __init__(self, runner: Runner, *, overlap: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner = runner
        self._ahead = cast(Overlapping, runner) if overlap and hasattr(runner, "launch") else None
        self._clock = clock
        self._under_way: deque[tuple[StepPlan, Any, float]] = deque()  # plan, ticket, when launched
        self._last_end = 0.0

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def closed(self) -> bool:
        """No step may be planned before the one under way is collected."""
        if self._ahead is None:
            return False  # steps end where they are launched
        return any(self._ahead.stands_alone(plan) for plan, _, _ in self._under_way)

    def launch(self, plan: StepPlan) -> None:
        """Begin a step, which a runner that computes one at a time does at once."""
        now = self._clock()
        ticket = self._ahead.launch(plan) if self._ahead else self._runner.execute(plan)
        self._under_way.append((plan, ticket, now))

    def collect(self, leave: int = 0) -> Step | None:
        """The oldest step, once it has ended; None if not more than `leave` are under way."""
        keep = leave if self._ahead else 0
        if len(self._under_way) <= keep:
            return None
        plan, ticket, launched = self._under_way.popleft()
        result = self._ahead.collect(ticket) if self._ahead else ticket
        now = self._clock()
        began = max(launched, self._last_end)
        self._last_end = now
        return Step(plan, result, now - began)
