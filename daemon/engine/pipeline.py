"""The steps in flight. Each step is launched, collected and applied in turn; if the runner can, the next step is
launched before the last one is collected, so that the device never waits for the host.

A step that raises at its launch is computed again row by row (`isolation`): it ends the requests that are the cause,
and no others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from daemon.engine.isolation import compute_row_by_row
from daemon.engine.runner import Overlapping, Runner, StepPlan, StepResult


class Step(NamedTuple):
    """A step that has ended. `seconds`: since its launch or, if that was later, since the end of the step before."""

    plan: StepPlan
    result: StepResult
    seconds: float


class _Failed(NamedTuple):
    """The ticket of a step whose launch raised: nothing of it is in flight."""

    error: Exception


class Pipeline:
    """Connects the scheduler with the runner. `overlap`: launch one step ahead if the runner can.

    `beat` is called while a step that failed is computed row by row, which takes longer than a step.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        overlap: bool = True,
        clock: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._beat = beat
        self._overlapping = cast(Overlapping, runner) if overlap and hasattr(runner, "launch") else None
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, Any, float]] = deque()  # plan, ticket, launch time
        self._last_end = 0.0

    def __len__(self) -> int:
        """Number of steps in flight."""
        return len(self._in_flight)

    @property
    def closed(self) -> bool:
        """True if the step in flight must be collected before the next one is planned."""
        runner = self._overlapping
        if runner is None:
            return False  # a step ends in `launch`
        return any(isinstance(ticket, _Failed) or runner.blocks_overlap(plan) for plan, ticket, _ in self._in_flight)

    def launch(self, plan: StepPlan) -> None:
        """Launch a step. A runner that cannot overlap computes it before this returns."""
        now = self._clock()
        self._in_flight.append((plan, self._launch(plan), now))

    def _launch(self, plan: StepPlan) -> Any:
        if self._overlapping is not None:
            try:
                return self._overlapping.launch(plan)
            except Exception as e:
                return _Failed(e)  # computed in `collect`, once no other step is in flight
        try:
            return self._runner.execute(plan)
        except Exception as e:
            return compute_row_by_row(self._runner, plan, e, self._beat)

    def collect(self, leave: int = 0) -> Step | None:
        """Wait for the oldest step and return it; return None if at most `leave` steps are in flight."""
        keep = leave if self._overlapping else 0
        if len(self._in_flight) <= keep:
            return None
        plan, ticket, launched = self._in_flight.popleft()
        result = self._collect(plan, ticket)
        now = self._clock()
        began = max(launched, self._last_end)
        self._last_end = now
        return Step(plan, result, now - began)

    def _collect(self, plan: StepPlan, ticket: Any) -> StepResult:
        if isinstance(ticket, _Failed):
            return compute_row_by_row(self._runner, plan, ticket.error, self._beat)
        return self._overlapping.collect(ticket) if self._overlapping else cast(StepResult, ticket)
