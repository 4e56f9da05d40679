"""The interface between the HTTP routes and the request tracker."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from daemon.enums import EarlyEnd
from daemon.ipc.messages import Finish, SamplingParams, TokenLogprobs
from daemon.ipc.prompt_logprobs import PromptLogprob


class Overloaded(Exception):
    """There is no room now: 429 with Retry-After. `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooMany(Exception):
    """The request asks for more choices, or more room for them, than one request ever may: 400."""


class NoEngine(Exception):
    """No engine can serve now: 503."""


class TooLong(Exception):
    """The request can never run here (its prompt or its reservation exceeds the capacity of an engine): 400."""


class EngineLost(Exception):
    """The engine of a running request died or gave up: a stream sends an error event and closes.

    `retry`: False if the request itself may be the cause, so that sending it again would do the same.
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.retry = retry


class ShuttingDown(Exception):
    """The daemon ends before a running request has finished: 503, and a stream sends an error event and closes."""


class TokenChunk(NamedTuple):
    """All output of one choice since the last call."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None
    finish: Finish  # NONE: more will come
    num_cached_tokens: int  # prompt tokens served from the prefix cache


class TokenStream(Protocol):
    """Output of one running choice. A slow reader gets larger chunks, never a longer queue."""

    rid: int
    slot: int  # in the journal
    accepted: int  # output tokens journaled

    async def next(self) -> TokenChunk:
        """Wait for output and return all of it. Raises EngineLost or ShuttingDown."""
        ...

    @property
    def done(self) -> bool:
        """True once the request has ended, with or without an error."""
        ...

    @property
    def finish(self) -> Finish:
        """How the request has ended; NONE if it has not, or has ended with an error."""
        ...

    @property
    def failure(self) -> Exception | None:
        """The error that the request has ended with."""
        ...

    def replay(self, position: int) -> TokenChunk:
        """Return the journaled output before `position`; `next` goes on from there, whatever it has returned before.

        Raises ValueError if less output is journaled.
        """
        ...

    def prompt(self) -> list[int]:
        """Return the tokens of the prompt."""
        ...

    def prompt_logprobs(self, start: int, stop: int) -> list[PromptLogprob]:
        """Return those of prompt tokens [start, stop), which the request asks for. `start`: at least 1.

        They are complete once output, or the end, has arrived. Raises EngineLost if they are not.
        """
        ...

    def cancel(self, why: EarlyEnd | None = None) -> None:
        """Stop the request and free its blocks. No-op if it has finished. `why`: None if its output is complete."""
        ...

    def release(self) -> None:
        """Forget the request: its output is delivered. Cancel it if it has not finished. Call nothing afterwards."""
        ...


class Admitted(Protocol):
    """Places of a request whose choices are not submitted yet."""

    def submitted(self) -> None:
        """Release one place: the choice that was just submitted holds one itself."""
        ...


class RequestAttributes(NamedTuple):
    """What a request has besides its prompt and its sampling."""

    label: str  # its public id
    priority: int = 0
    cache_salt: bytes = b""  # of its prefix blocks
    client: str = ""  # as in `Generator.admit`
    x_request_id: str = ""  # that its client has sent


class Generator(Protocol):
    """The part of the request tracker that the routes use."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output of the engines, tokens; 0 until an engine is ready."""
        ...

    def admit(self, count: int, *, client: str = "", priority: int = 0) -> AbstractContextManager[Admitted]:
        """Take `count` places in the queue limit, before tokenising; the rest is released on exit.

        `client`: the one that they count for; "": not told apart from others. Raises Overloaded, TooMany or NoEngine.
        """
        ...

    def check_room(
        self,
        lengths: list[tuple[int, int]],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> None:
        """Raise TooMany if the journal can never hold all choices of a request. Call it before the first `submit`.

        `lengths`: (prompt tokens, largest number of output tokens) of each choice. The rest: as for its first choice.
        """
        ...

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> TokenStream:
        """Write the request to the journal and start it on the freest engine.

        Raises Overloaded, NoEngine or TooLong.
        """
        ...

    @property
    def ready(self) -> bool:
        """True if at least one engine serves and this frontend does not drain."""
        ...
