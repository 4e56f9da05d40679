"""The seam between the HTTP routes and the tracker: what a route may ask for, and what it gets back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from daemon.ipc.messages import Finish, SamplingParams, TokenLogprobs


class Overloaded(Exception):
    """No room now: 429 with Retry-After. `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoEngine(Exception):
    """No engine can serve now: 503."""


class TooLong(Exception):
    """The request can never run here (prompt, or its reservation, exceeds what an engine has): 400."""


class EngineLost(Exception):
    """The request's engine died or gave up in the middle: an error event, then the stream closes."""


class Piece(NamedTuple):
    """Everything that arrived for one choice since the last call."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None
    finish: Finish  # NONE: more will come
    cached: int  # prompt tokens served from the prefix cache


class Stream(Protocol):
    """One choice in flight. A slow reader gets larger pieces, never a longer queue."""

    rid: int

    async def next(self) -> Piece:
        """Wait until something is there. Raises Lost."""
        ...

    def cancel(self) -> None:
        """Stop it and free its blocks. Harmless when it is finished."""
        ...


class Admission(Protocol):
    """`count` requests' places in the queue limit, taken before tokenising; released on exit."""

    def __enter__(self) -> Admission: ...
    def __exit__(self, *exc: object) -> None: ...


class Generator(Protocol):
    """What the routes see of the control plane."""

    @property
    def max_model_len(self) -> int:
        """Of the engines, in tokens; 0 until one is ready."""
        ...

    def admit(self, count: int) -> Admission:
        """Raises Overloaded or NoEngine."""
        ...

    def submit(
        self, prompt: list[int], params: SamplingParams, *, label: str, priority: int = 0, cache_salt: bytes = b""
    ) -> Stream:
        """Journal the request and start it on the freest engine. Raises Overloaded, NoEngine or TooLong."""
        ...

    @property
    def ready(self) -> bool:
        """At least one engine is serving and this frontend is not draining."""
        ...
