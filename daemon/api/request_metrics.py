"""Metrics of one choice: latencies, token counts, and how it ended; and of rejected requests."""

from __future__ import annotations

from daemon.api.errors import ApiError
from daemon.enums import Rejection
from daemon.ipc.messages import Finish
from daemon.ipc.metrics_page import MetricsPage

REASONS = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.CANCELLED: "abort",
    Finish.ERROR: "error",
    Finish.DEADLINE: "deadline",
    Finish.DEAD_END: "error",
}
_REJECTED = {
    "rate_limit_exceeded": Rejection.OVERLOADED,
    "no_engine": Rejection.NO_ENGINE,
    "context_length_exceeded": Rejection.TOO_LONG,
}


class RequestMetrics:
    """Records the latencies and token counts of one choice. All times are CLOCK_MONOTONIC seconds."""

    __slots__ = ("_arrival", "_ended", "_first", "_last", "_page", "_resumed", "tokens")

    def __init__(self, page: MetricsPage, arrival: float, prompt_tokens: int, max_tokens: int) -> None:
        self._page = page
        self._arrival = arrival
        self._first = self._last = -1.0
        self.tokens = 0  # output tokens that are counted
        self._ended = False
        self._resumed = False
        page.inc("prompt_tokens", prompt_tokens)
        page.observe("request_prompt_tokens", prompt_tokens)
        page.observe("request_params_max_tokens", max_tokens)

    @classmethod
    def resumed(cls, page: MetricsPage, arrival: float, tokens: int) -> RequestMetrics:
        """Return the record of a choice that a former process has begun, and counted up to `tokens` output tokens.

        When these arrived is not known, so it records no latencies between them.
        """
        found = cls.__new__(cls)
        found._page, found._arrival, found.tokens = page, arrival, tokens
        found._first = found._last = -1.0
        found._ended, found._resumed = False, tokens > 0
        return found

    def close(self) -> None:
        """Record nothing further: a former process has recorded the end."""
        self._ended = True

    def output(self, now: float, tokens: int) -> None:
        """Record `tokens` > 0 that arrived together at `now`; they share the time since the previous ones evenly."""
        if self._first < 0:
            self._first = now
            if not self._resumed:
                self._page.observe("time_to_first_token_seconds", now - self._arrival)
        else:
            self._page.observe("inter_token_latency_seconds", (now - self._last) / tokens, tokens)
        self._last = now
        self.tokens += tokens
        self._page.inc("generation_tokens", tokens)

    def end(self, now: float, finish: Finish, cached: int) -> None:
        """Record the end of the choice; only the first call counts. `cached`: prompt tokens from a prefix cache."""
        if self._ended:
            return
        self._ended = True
        page = self._page
        page.inc("request_success", 1, REASONS[finish])
        page.inc("cached_prompt_tokens", cached)
        page.observe("e2e_request_latency_seconds", now - self._arrival)
        page.observe("request_generation_tokens", self.tokens)
        if self.tokens and not self._resumed:
            decode = self._last - self._first
            page.observe("request_decode_time_seconds", decode)
            if self.tokens > 1:
                page.observe("request_time_per_output_token_seconds", decode / (self.tokens - 1))


def count_rejection(page: MetricsPage, error: ApiError) -> None:
    """Count the error of a completion, raised before or while it ran: overloaded, no engine, too long or invalid.

    Status 401 and other errors of status 5xx are no rejections and are not counted.
    """
    if error.code in _REJECTED:
        page.inc("admission_rejections", 1, _REJECTED[error.code])
    elif error.status < 500 and error.status != 401:
        page.inc("admission_rejections", 1, Rejection.INVALID)
