"""One unfinished request of a frontend: its ownership, its journal slot, and output that its reader has not taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from daemon.api.admission import Holder
from daemon.api.generator import EngineLost, ShuttingDown, TokenChunk
from daemon.control.policy.ownership import Ownership
from daemon.enums import EarlyEnd
from daemon.ipc.journal import Crashes, Failure, Journal, SlotState
from daemon.ipc.messages import EngineIncarnation, Finish, TokenLogprobs
from daemon.ipc.prompt_logprobs import PromptLogprob

CANCELLED_AS = {None: Finish.STOP, EarlyEnd.DEADLINE: Finish.DEADLINE}  # by cause; the others: Finish.CANCELLED
_FAILED = (Finish.CANCELLED, Finish.ERROR, Finish.DEADLINE, Finish.DEAD_END)  # for the reader these are errors
SHUTTING_DOWN = "The server is shutting down and has ended this request; please send it again."


class RequestState:
    """State of one unfinished request. Implements `TokenStream`.

    Every change reaches the journal first, then this object, then the reader. `epoch` and `accepted` are separate
    attributes because each output row reads them; `ownership` combines them for decisions.
    """

    __slots__ = (
        "_arrived", "_failure", "_finish", "_journal", "_logprobs", "_on_cancel", "_on_release", "_ownership",
        "_released", "_waiter", "accepted", "crashes", "epoch", "holder", "last_output_at", "num_cached_tokens",
        "paused_since", "prefix_keys", "rid", "slot", "weights",
    )  # fmt: skip

    def __init__(
        self,
        journal: Journal,
        slot: int,
        ownership: Ownership,
        prefix_keys: list[int],
        holder: Holder,
        on_cancel: Callable[[RequestState, EarlyEnd | None], None],
        on_release: Callable[[RequestState], None],
    ) -> None:
        """`slot`: opened in `journal` for this request. `ownership`: as journaled, or about to be by `assign`.

        `on_cancel`: called when the reader cancels it; `on_release`: once its output is delivered.
        """
        self._journal = journal
        self._on_cancel = on_cancel
        self._on_release = on_release
        self._released = False
        self.rid = ownership.rid
        self.slot = slot
        self.prefix_keys = prefix_keys  # of its prompt, see `PrefixAffinity`
        self.holder = holder  # as at admission; a later priority does not change it
        self._ownership = ownership
        self.accepted = ownership.accepted  # output tokens journaled
        self.epoch = ownership.epoch
        self.crashes = Crashes()  # that it has been through
        self.weights = 0  # of the engine that it was last started on, as in `EngineFacts`; 0: not known
        self.last_output_at = 0.0  # when output last arrived, CLOCK_MONOTONIC seconds
        self.paused_since = 0.0  # `last_output_at` of before a takeover; 0 once output has arrived again
        self._arrived: list[int] = []
        self._logprobs: list[TokenLogprobs | None] | None = None
        self._finish = Finish.NONE
        self.num_cached_tokens = 0  # prompt tokens from the prefix cache
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    def adopt(
        cls,
        journal: Journal,
        slot: int,
        holder: Holder,
        on_cancel: Callable[[RequestState, EarlyEnd | None], None],
        on_release: Callable[[RequestState], None],
    ) -> RequestState:
        """Return the state of a predecessor's request, LIVE or ENDED, as the journal has it.

        Its priority counts as changed: the predecessor may have died before it told the winner of an award.
        """
        ownership = Ownership(
            rid=journal.rid(slot),
            epoch=journal.epoch(slot),
            owner=EngineIncarnation(*journal.owner(slot)),
            accepted=journal.num_output(slot),
            priority=journal.priority(slot),
            changed=True,
        )
        state = cls(journal, slot, ownership, [], holder, on_cancel, on_release)
        state.crashes = journal.crashes(slot)
        state.weights = journal.weights(slot)
        state.num_cached_tokens = journal.num_cached_tokens(slot)
        if journal.state(slot) is SlotState.ENDED:
            state._finish = journal.finish(slot)
            state._failure = _error(journal.failure(slot))
        state.replay(0)
        return state

    # -- ownership ----------------------------------------------------------------------------------

    @property
    def ownership(self) -> Ownership:
        """Epoch, owner, accepted output and priority, as the journal has them."""
        if self._ownership.accepted != self.accepted:
            self._ownership = self._ownership._replace(accepted=self.accepted)
        return self._ownership

    @property
    def owner(self) -> EngineIncarnation:
        """Engine that the request was last given to; it may have died since."""
        assert self._ownership.owner is not None
        return self._ownership.owner

    @property
    def engine(self) -> int:
        """Index of the owner."""
        return self.owner.engine

    @property
    def priority(self) -> int:
        """Current priority; lower goes first."""
        return self._ownership.priority

    @property
    def bound(self) -> int:
        """The weights that its output comes from, which all of it must come from; 0 while it has none."""
        return self.weights if self.accepted else 0

    def assign(self, ownership: Ownership) -> None:
        """Journal the new epoch and owner, and `weights`, with one store, and keep `ownership`."""
        assert ownership.owner is not None
        self._journal.assign(self.slot, ownership.epoch, *ownership.owner, self.weights)
        self._ownership = ownership
        self.epoch = ownership.epoch

    def reprioritise(self, ownership: Ownership) -> None:
        """Journal the new priority, and keep `ownership`."""
        self._journal.reprioritise(self.slot, ownership.priority)
        self._ownership = ownership

    def count_crash(self, *, failed: bool) -> None:
        """Count that the owner has crashed, once for each epoch: a successor of this process may see it again.

        `failed`: the owner has ended by an exception of its own.
        """
        if self.crashes.epoch != self.epoch:
            _, before, crashed = self.crashes
            self.crashes = Crashes(self.epoch, before + failed, crashed + 1)
            self._journal.record_crashes(self.slot, self.crashes)

    # -- output -------------------------------------------------------------------------------------

    def accept(
        self,
        start: int,
        tokens: list[int],
        logprobs: list[TokenLogprobs | None] | None,
        finish: Finish,
        cached: int,
        now: float,
    ) -> int:
        """Apply one output row of the current epoch: journal the new tokens and deliver them to the reader.

        `start`: output position of tokens[0]. `cached`: prompt tokens from the prefix cache. `now`: CLOCK_MONOTONIC
        seconds. Return the number of new tokens, as `ownership.fresh` counts them; the others repeat accepted output.
        Return -1, and change nothing, if output before `start` is missing.
        """
        repeated = self.accepted - start
        if repeated < 0:
            return -1
        if repeated:
            tokens = tokens[repeated:]
            logprobs = logprobs[repeated:] if logprobs is not None else None
        count = len(tokens)
        if cached != self.num_cached_tokens:
            self._journal.record_cached(self.slot, cached)
            self.num_cached_tokens = cached
        if count:
            self._journal.append(self.slot, tokens, logprobs)
            self.accepted += count
            self.last_output_at = now
        if self._arrived:
            self._arrived += tokens
        else:
            self._arrived = tokens
        if logprobs is not None:
            self._logprobs = logprobs if self._logprobs is None else self._logprobs + logprobs
        self._finish = finish
        self._wake()
        return count

    def append(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        """Journal output that a claim carried, all of it new, and deliver it to the reader."""
        self.accept(self.accepted, tokens, logprobs, Finish.NONE, self.num_cached_tokens, self.last_output_at)

    def end(self, finish: Finish) -> None:
        """End the stream without further output."""
        self._finish = finish
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with this error."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- TokenStream --------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True once the request has ended, with or without an error."""
        return self._finish is not Finish.NONE or self._failure is not None

    @property
    def finish(self) -> Finish:
        """How the request has ended; NONE if it has not, or has ended with an error."""
        return self._finish

    @property
    def failure(self) -> Exception | None:
        """The error that the request has ended with."""
        return self._failure

    async def next(self) -> TokenChunk:
        """Wait for output and take all that has arrived. Raises the error of `fail`."""
        while not self._arrived and not self.done:
            self._waiter = waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                if self._waiter is waiter:  # otherwise another reader of a kept stream waits already
                    self._waiter = None
        if self._failure is not None and not self._arrived:
            raise self._failure
        finish = self._finish
        if finish and self._arrived and finish in _FAILED:
            finish = Finish.NONE  # the output comes before it
        chunk = TokenChunk(self._arrived, self._logprobs, finish, self.num_cached_tokens)
        self._arrived, self._logprobs = [], None
        return chunk

    def replay(self, position: int) -> TokenChunk:
        """Return the journaled output before `position`; `next` goes on from there, whatever it has returned before.

        Raises ValueError if less output is journaled.
        """
        if position > self.accepted:
            raise ValueError(f"request {self.rid} has {self.accepted} output tokens, not {position}")
        tokens = self._journal.output(self.slot)
        logprobs = None
        if self._journal.params(self.slot).sampling.logprobs >= 0:
            logprobs = [self._journal.logprobs(self.slot, i) for i in range(len(tokens))]
        self._arrived, self._logprobs = tokens[position:], logprobs and logprobs[position:]
        return TokenChunk(tokens[:position], logprobs and logprobs[:position], Finish.NONE, self.num_cached_tokens)

    def prompt(self) -> list[int]:
        """Return the tokens of the prompt."""
        return self._journal.prompt(self.slot)

    def prompt_logprobs(self, start: int, stop: int) -> list[PromptLogprob]:
        """Return those of prompt tokens [start, stop), which the request asks for. `start`: at least 1.

        Raises EngineLost unless they are complete: they are before the first output, or the end, arrives.
        """
        if self._journal.num_prompt_logprobs(self.slot) < stop - 1:
            raise EngineLost("the logprobs of the prompt were lost; please send it again")
        return self._journal.prompt_logprobs(self.slot, start - 1, stop - 1)

    def cancel(self, why: EarlyEnd | None = None) -> None:
        """Cancel the request. No effect once it has ended. `why`: None if its output is complete."""
        if not self.done:
            self._on_cancel(self, why)

    def release(self) -> None:
        """Free the journal slot: the output is delivered. Cancel the request if it has not ended."""
        self.cancel()
        if not self._released:
            self._released = True
            self._on_release(self)


def _error(failure: Failure) -> Exception | None:
    """Return the error that ended a predecessor's request. Its text is not journaled."""
    match failure:
        case Failure.NONE:
            return None
        case Failure.SHUTDOWN:
            return ShuttingDown(SHUTTING_DOWN)
        case Failure.LOST:
            return EngineLost("the engine that ran this request died; please send it again")
        case _:
            return EngineLost("the engine could not run this request", retry=False)
