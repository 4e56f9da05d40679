"""Log lines that a client can cause: at most one in ten seconds of each kind, with the number of those left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_PERIOD = 10.0  # seconds


class RateLimitedLog:
    """Writes lines of one kind to a logger, at most one in `period` seconds. `clock` returns seconds."""

    def __init__(
        self,
        logger: logging.Logger,
        level: int,
        period: float = _PERIOD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._level = level
        self._period = period
        self._clock = clock
        self._next = float("-inf")
        self._left_out = 0

    def write(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Write the line, or count it if the last one is too recent."""
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} more since the last such line)" if self._left_out else ""
        self._next, self._left_out = now + self._period, 0
        self._logger.log(self._level, message + "%s", *args, more, exc_info=exc_info)
