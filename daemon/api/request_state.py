"""One request in flight, as its frontend knows it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from daemon.api.generator import EngineLost, Piece
from daemon.control.policy.ownership import Ownership
from daemon.ipc.messages import EngineIncarnation, Finish, TokenLogprobs

if TYPE_CHECKING:
    from daemon.api.request_tracker import RequestTracker


class RequestState:
    """One request in flight: what arrived and was not taken by its reader yet. Implements `Stream`."""

    __slots__ = (
        "_arrived", "_failure", "_finish", "_logprobs", "_tracker", "_waiter",
        "accepted", "cached", "changed", "crashes", "engine", "epoch", "heard", "incarnation", "names", "paused",
        "priority", "rid", "slot",
    )  # fmt: skip

    def __init__(self, tracker: RequestTracker, rid: int, slot: int, priority: int) -> None:
        self._tracker = tracker
        self.rid = rid
        self.slot = slot
        self.names: list[int] = []  # of its prompt's beginnings, see `PrefixAffinity`
        self.priority = priority  # as it is now
        self.changed = False  # its priority, since this epoch began
        self.epoch = 0
        self.engine = -1  # its owner, and
        self.incarnation = 0  # the owner's incarnation
        self.accepted = 0  # output tokens journaled
        self.crashes = 0  # engines that died while they had it
        self.heard = 0.0  # when output last came, CLOCK_MONOTONIC seconds
        self.paused = 0.0  # that of the last output before a takeover, while none has come since
        self._arrived: list[int] = []
        self._logprobs: list[TokenLogprobs | None] | None = None
        self._finish = Finish.NONE
        self.cached = 0
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        return self._finish is not Finish.NONE or self._failure is not None

    async def next(self) -> Piece:
        while not self._arrived and not self.done:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None and not self._arrived:
            raise EngineLost(self._failure)
        finish = Finish.NONE if self._failure is not None else self._finish
        piece = Piece(self._arrived, self._logprobs, finish, self.cached)
        self._arrived, self._logprobs = [], None
        return piece

    def cancel(self) -> None:
        if not self.done:
            self._tracker.cancel(self, Finish.CANCELLED)

    @property
    def ownership(self) -> Ownership:
        """Who runs it, as the journal has it."""
        owner = EngineIncarnation(self.engine, self.incarnation)
        return Ownership(self.rid, self.epoch, owner, self.accepted, self.priority, self.changed)

    def deliver(
        self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None, finish: Finish, cached: int
    ) -> None:
        """Hand accepted tokens to the reader."""
        if self._arrived:
            self._arrived += tokens
        else:
            self._arrived = tokens
        if logprobs is not None:
            self._logprobs = logprobs if self._logprobs is None else self._logprobs + logprobs
        self._finish = finish
        self.cached = cached
        self._wake()

    def end(self, finish: Finish) -> None:
        self._finish = finish
        self._wake()

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
