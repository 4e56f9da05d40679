"""How fast an engine goes: moving averages over its steps. Pure."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest step
_MIN_DEADLINE = 10.0  # seconds a step may always take
_DEADLINE_FACTOR = 50  # times the average step


class StepStats:
    """Step time (exponential average) and tokens a second (over the last full second)."""

    def __init__(self, now: float) -> None:
        self.step_seconds = 0.0
        self.tokens_per_second = 0.0
        self._since = now
        self._tokens = 0
        self.seconds = 0  # that were closed

    def step(self, seconds: float, tokens: int, now: float) -> None:
        """Fold one step of `seconds` that emitted `tokens`."""
        self.step_seconds += (seconds - self.step_seconds) * (_WEIGHT if self.step_seconds else 1.0)
        self._tokens += tokens
        self.tick(now)

    def tick(self, now: float) -> None:
        """Close the second, if one has passed."""
        if now - self._since >= 1.0:
            self.tokens_per_second = self._tokens / (now - self._since)
            self._since, self._tokens = now, 0
            self.seconds += 1

    @property
    def step_deadline(self) -> float:
        """Seconds after which a step is suspiciously late."""
        return max(_MIN_DEADLINE, _DEADLINE_FACTOR * self.step_seconds)
