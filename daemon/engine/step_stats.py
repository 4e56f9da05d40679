"""The speed of an engine: moving averages over its steps. Pure."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest step
_MIN_DEADLINE = 5.0  # seconds that a step may always take
_DEADLINE_FACTOR = 10  # times the average step, or what this step should cost if that is more


class StepStats:
    """Step time (exponential average) and tokens per second (over the last full second)."""

    def __init__(self, now: float) -> None:
        self.step_seconds = 0.0
        self.tokens_per_second = 0.0
        self.num_intervals = 0  # intervals of about one second that have ended
        self._interval_began = now
        self._tokens = 0

    def step(self, seconds: float, tokens: int, now: float) -> None:
        """Count one step of `seconds` that emitted `tokens`."""
        self.step_seconds += (seconds - self.step_seconds) * (_WEIGHT if self.step_seconds else 1.0)
        self._tokens += tokens
        self.tick(now)

    def tick(self, now: float) -> None:
        """End the interval if a second has passed."""
        if now - self._interval_began >= 1.0:
            self.tokens_per_second = self._tokens / (now - self._interval_began)
            self._interval_began, self._tokens = now, 0
            self.num_intervals += 1

    def deadline(self, expected: float = 0.0) -> float:
        """Return the seconds after which a step is late; `expected`: its cost as measured at the start."""
        return max(_MIN_DEADLINE, _DEADLINE_FACTOR * max(self.step_seconds, expected))
