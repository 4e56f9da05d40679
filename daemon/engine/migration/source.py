"""The outgoing moves of one engine: the source's side of a migration. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from daemon.engine.migration.actions import Action, Copy, Journals, Report, Send, Tell
from daemon.engine.request import Request
from daemon.engine.scheduler import Emission, Scheduler
from daemon.enums import MigrationMode, MigrationResult
from daemon.ipc.messages import (
    Aborted,
    EngineIncarnation,
    Handover,
    MigrateTo,
    Reclaim,
    Reserve,
    Reserved,
    TokenLogprobs,
)

MAX_OUTGOING = 4  # concurrent moves
MAX_RESERVATIONS = 8  # after so many, a request that writes KV faster than it is copied is frozen all the same
PATIENCE = 1.0  # seconds that a frozen request waits for the frontend's decision before the source sends Reclaim
ABSENT = 0  # entry of `Outgoing.table` for a block that needs no copy (block 0 is the dummy)


class Phase(Enum):
    """Progress of an outgoing move."""

    RESERVING = auto()  # waits for Reserved
    COPYING = auto()  # full blocks are being copied
    READY = auto()  # waits for the end of a step
    COPYING_TAIL = auto()  # frozen; the remaining blocks are being copied
    HANDED_OVER = auto()  # frozen; Handover is sent
    RECLAIMING = auto()  # frozen; Reclaim is sent
    ABORTING = auto()  # given up; waits for the end of its copy to send Aborted


FROZEN = frozenset({Phase.COPYING_TAIL, Phase.HANDED_OVER, Phase.RECLAIMING})
DECIDABLE = frozenset({Phase.HANDED_OVER, Phase.RECLAIMING})
WITH_COPY = frozenset({Phase.COPYING, Phase.COPYING_TAIL, Phase.ABORTING})


class OutputTail(NamedTuple):
    """Output tokens from position `start` on."""

    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


@dataclass(slots=True, eq=False)
class Outgoing:
    """One move away from this engine.

    `table` mirrors the block table at the destination; its first `num_present` blocks need no copy.
    """

    move: int
    peer: EngineIncarnation
    request: Request
    preemptions: int  # of the request when the move began: one more means that its KV is gone
    first_logprob: int  # output position from which on `logprobs` is kept
    reason: str  # of the order
    began: float  # seconds
    blocking: bool = False  # freeze first, then copy everything: the baseline for live migration
    phase: Phase = Phase.RESERVING
    reservation: int = 0  # number of the next Reserve; a further copy that needs no Reserve counts as one too
    table: list[int] = field(default_factory=list)
    num_present: int = 0
    copy_end: int = 0  # `num_present` once the copy in progress has ended
    phase_began: float = 0.0  # seconds
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    tail: OutputTail = OutputTail(0, [], None)  # fixed at the freeze
    num_copies: int = 0  # copies begun
    copied: int = 0  # blocks
    skipped: int = 0  # blocks that the destination already had
    frozen_at: float = -1.0  # seconds; -1: not frozen yet
    outcome: tuple[MigrationResult, str] = (MigrationResult.TAKEN_BACK, "")  # result and detail of the report

    @property
    def frozen(self) -> bool:
        return self.phase in FROZEN

    def set_outcome(self, result: MigrationResult, detail: str = "") -> None:
        """Note how the move will end. The first cause counts; a second one changes nothing."""
        if self.outcome[0] is MigrationResult.TAKEN_BACK:
            self.outcome = result, detail


class Source:
    """The outgoing moves of one engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        journals: Journals,
        *,
        max_outgoing: int = MAX_OUTGOING,
        patience: float = PATIENCE,
    ) -> None:
        self.outgoing: dict[int, Outgoing] = {}  # by move
        self.num_moves = 0  # moves begun
        self._scheduler = scheduler
        self._journals = journals
        self._max_outgoing = max_outgoing
        self._patience = patience
        self._block_seconds = 0.0  # time to copy one block, as last observed; 0: not observed yet

    @property
    def undecided(self) -> list[Request]:
        """The frozen requests that the frontend can grant to this engine: no copy of them is in progress."""
        return [o.request for o in self.outgoing.values() if o.phase in DECIDABLE]

    @property
    def frozen(self) -> list[Request]:
        """Requests of this engine that wait for the frontend's decision."""
        return [o.request for o in self.outgoing.values() if o.frozen]

    def is_moving(self, request: Request) -> bool:
        """Return True if a move of the request is in progress."""
        return any(o.request is request for o in self.outgoing.values())

    def is_intact(self, outgoing: Outgoing) -> bool:
        """Return True if the request still runs here on the KV that it had when the move began."""
        request = outgoing.request
        return self._scheduler.running.get(request.rid) is request and request.preemptions == outgoing.preemptions

    def may_begin(self, peer: EngineIncarnation, *, drain: bool) -> bool:
        """Return True if another move to `peer` may begin: one at a time, or several for a drain."""
        if len(self.outgoing) >= self._max_outgoing:
            return False
        return drain or not any(o.peer == peer for o in self.outgoing.values())

    # -- reservation and copies ----------------------------------------------------------------

    def begin(self, request: Request, peer: EngineIncarnation, order: MigrateTo, now: float) -> list[Action]:
        """Begin to move a running request."""
        self.num_moves += 1
        outgoing = Outgoing(
            move=self.num_moves,
            peer=peer,
            request=request,
            preemptions=request.preemptions,
            first_logprob=request.num_output,
            reason=order.reason,
            began=now,
            blocking=order.how == MigrationMode.BLOCKING,
        )
        self.outgoing[outgoing.move] = outgoing
        return [self._reserve(outgoing, now)]

    def _reserve(self, outgoing: Outgoing, now: float) -> Action:
        """Ask for room for the known tokens and one block more, so that the freeze need not wait for an answer."""
        request, scheduler = outgoing.request, self._scheduler
        longest = min(request.last_position, scheduler.max_len)
        outgoing.phase, outgoing.phase_began = Phase.RESERVING, now
        message = Reserve(
            move=outgoing.move,
            rid=request.rid,
            epoch=request.epoch,
            frontend=request.frontend,
            slot=request.slot,
            reservation=outgoing.reservation,
            num_tokens=min(len(request.tokens) + scheduler.blocks.block_size, longest),
            longest=longest,
            hashes=[] if outgoing.reservation else scheduler.prefix_hashes(request),
            fingerprint=scheduler.blocks.fingerprint,
        )
        return Send(outgoing.peer, message)

    def on_reserved(self, answer: Reserved, now: float) -> list[Action]:
        """Note the blocks at the destination and copy the blocks that are full. A stale answer changes nothing."""
        outgoing = self.outgoing.get(answer.move)
        if outgoing is None or outgoing.phase is not Phase.RESERVING or outgoing.reservation != answer.reservation:
            return []
        if not self.is_intact(outgoing):
            return self._abort(outgoing, now)
        if not answer.reservation:
            outgoing.table = [ABSENT] * answer.skip
            outgoing.num_present = outgoing.skipped = answer.skip
        outgoing.table += answer.blocks
        outgoing.reservation += 1
        outgoing.phase = Phase.READY
        return [] if outgoing.blocking else self._copy_full_blocks(outgoing, now)

    def on_declined(self, outgoing: Outgoing, reason: str, now: float) -> list[Action]:
        """Handle a Declined: the destination has no room, or cannot rebuild the request that was handed over."""
        outgoing.set_outcome(MigrationResult.DECLINED, reason)
        match outgoing.phase:
            case Phase.RESERVING:
                return self.end(outgoing, now)
            case Phase.HANDED_OVER:
                return self._reclaim(outgoing)
        return []

    def _copy_full_blocks(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Copy the full blocks that have room at the destination: their content does not change any more."""
        full = outgoing.request.num_computed // self._scheduler.blocks.block_size
        return self._copy(outgoing, min(full, len(outgoing.table)), Phase.COPYING, now)

    def _copy(self, outgoing: Outgoing, end: int, phase: Phase, now: float) -> list[Action]:
        """Copy the blocks before `end` that the destination lacks. Return no action if it lacks none."""
        start = outgoing.num_present
        if end <= start:
            return []
        pairs = zip(outgoing.request.block_table[start:end], outgoing.table[start:end], strict=True)
        outgoing.phase, outgoing.copy_end, outgoing.phase_began = phase, end, now
        outgoing.num_copies += 1
        return [Copy(outgoing.peer, outgoing.move, list(pairs))]

    def on_copied(self, move: int, now: float) -> list[Action]:
        """Handle the end of a copy. Return no action if the move is over."""
        outgoing = self.outgoing.get(move)
        if outgoing is None:
            return []
        match outgoing.phase:
            case Phase.ABORTING:
                outgoing.copied += outgoing.copy_end - outgoing.num_present
                return self.end(outgoing, now)
            case Phase.COPYING:
                self._note_copy(outgoing, now)
                outgoing.phase = Phase.READY
                return [] if self.is_intact(outgoing) else self._abort(outgoing, now)
            case Phase.COPYING_TAIL:
                self._note_copy(outgoing, now)
                return self._hand_over(outgoing, now)
        return []

    def on_copy_failed(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Handle a copy that ended early. The request stays here; if it is frozen, the frontend must agree."""
        outgoing.set_outcome(MigrationResult.COPY_FAILED)
        if outgoing.phase is not Phase.COPYING_TAIL:
            return self.end(outgoing, now)
        return [_aborted(outgoing), *self._reclaim(outgoing)]

    def _note_copy(self, outgoing: Outgoing, now: float) -> None:
        blocks = outgoing.copy_end - outgoing.num_present
        self._block_seconds = (now - outgoing.phase_began) / blocks
        outgoing.num_present = outgoing.copy_end
        outgoing.copied += blocks

    # -- between two steps ---------------------------------------------------------------------

    def after_step(self, emissions: Iterable[Emission], now: float, step_seconds: float) -> list[Action]:
        """Advance the moves that wait for the end of a step. See `Llumlet.after_step`."""
        self._keep_logprobs(emissions)
        actions = self.abort_broken(now)
        for outgoing in [o for o in self.outgoing.values() if o.phase is Phase.READY]:
            actions += self._proceed(outgoing, now, step_seconds)
        return actions

    def _keep_logprobs(self, emissions: Iterable[Emission]) -> None:
        """Keep the logprobs that the journal may lack at the freeze: a `Request` does not hold them."""
        wanted = {o.request.rid: o for o in self.outgoing.values() if o.request.sampling.logprobs >= 0}
        for emission in emissions if wanted else ():
            outgoing = wanted.get(emission.request.rid)
            if outgoing is not None and outgoing.request is emission.request:
                outgoing.logprobs += emission.logprobs or [None] * len(emission.tokens)

    def _proceed(self, outgoing: Outgoing, now: float, step_seconds: float) -> list[Action]:
        """Freeze the request, copy more full blocks, or ask for more room."""
        blocks, request = self._scheduler.blocks, outgoing.request
        if request.paused:  # the freeze is already decided; it waited only for the step that has just ended
            return self._freeze(outgoing, now)
        if blocks.blocks_for(request.length) > len(outgoing.table):
            return [self._reserve(outgoing, now)]
        left = blocks.blocks_for(request.num_computed) - outgoing.num_present
        small = left <= 1 or left * self._block_seconds < step_seconds
        if outgoing.blocking or small or outgoing.reservation >= MAX_RESERVATIONS:
            return self._freeze(outgoing, now)
        outgoing.reservation += 1
        return self._copy_full_blocks(outgoing, now)

    def _freeze(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Take the request out of the batch and send the remaining blocks.

        Wait until the journal holds the output that was emitted before the move began: the logprobs of that output
        were not kept. For the same reason wait until it holds the logprobs of the whole prompt. Wait also while a
        step in flight contains the request: then leave the request out of the next step, and freeze it when the
        result of the step in flight is applied.
        """
        request = outgoing.request
        start = self._journals.accepted(request)
        if start < outgoing.first_logprob or not self._journals.is_scored(request):
            return []
        if request.in_flight:
            self._scheduler.pause(request)
            return []
        logprobs = outgoing.logprobs[start - outgoing.first_logprob :] if request.sampling.logprobs >= 0 else None
        outgoing.tail = OutputTail(start, request.tokens[request.prompt_len + start :], logprobs)
        self._scheduler.detach(request)
        outgoing.frozen_at = now
        num_blocks = self._scheduler.blocks.blocks_for(request.num_computed)
        return self._copy(outgoing, num_blocks, Phase.COPYING_TAIL, now) or self._hand_over(outgoing, now)

    def _hand_over(self, outgoing: Outgoing, now: float) -> list[Action]:
        outgoing.phase, outgoing.phase_began = Phase.HANDED_OVER, now
        request, tail = outgoing.request, outgoing.tail
        message = Handover(
            move=outgoing.move,
            rid=request.rid,
            epoch=request.epoch,
            num_computed=request.num_computed,
            num_cached=request.num_cached,
            start=tail.start,
            tokens=tail.tokens,
            logprobs=tail.logprobs,
        )
        return [Send(outgoing.peer, message)]

    # -- claims of the source ------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Abort broken moves, and reclaim each request that has waited too long for the frontend's decision."""
        actions = self.abort_broken(now)
        for outgoing in self.outgoing.values():
            if outgoing.phase is Phase.HANDED_OVER and now - outgoing.phase_began >= self._patience:
                actions += self._reclaim(outgoing)
        return actions

    def claim_again(self, concerns: Callable[[Request], bool]) -> list[Action]:
        """Reclaim the requests that match and wait for a decision: the frontend may have died with its answer."""
        due = [o for o in self.outgoing.values() if o.phase in DECIDABLE and concerns(o.request)]
        return [action for outgoing in due for action in self._reclaim(outgoing)]

    def _reclaim(self, outgoing: Outgoing) -> list[Action]:
        outgoing.phase = Phase.RECLAIMING
        request, tail = outgoing.request, outgoing.tail
        return [Tell(request.frontend, Reclaim(request.rid, request.epoch, tail.start, tail.tokens, tail.logprobs))]

    # -- the end of a move ---------------------------------------------------------------------

    def on_peer_death(self, is_dead: Callable[[EngineIncarnation], bool], now: float) -> list[Action]:
        """End the moves to dead engines; reclaim those of their requests that are frozen."""
        actions: list[Action] = []
        for outgoing in [o for o in self.outgoing.values() if is_dead(o.peer)]:
            outgoing.set_outcome(MigrationResult.PEER_DIED)
            if not outgoing.frozen:
                actions.append(self.close(outgoing, now))
            elif outgoing.phase is not Phase.RECLAIMING:
                actions += self._reclaim(outgoing)
        return actions

    def drop_frozen(self, should_drop: Callable[[Request], bool], now: float, *, moved: bool) -> list[Action]:
        """Free the frozen requests that match. `moved`: the destination owns those that were handed over.

        A move whose tail is still being copied is aborted. After the Handover no Aborted is needed: the frontend
        refuses the destination's claim.
        """
        actions: list[Action] = []
        for outgoing in [o for o in self.outgoing.values() if o.frozen and should_drop(o.request)]:
            self._scheduler.discard(outgoing.request)
            if outgoing.phase is Phase.COPYING_TAIL:
                actions += self._abort(outgoing, now, MigrationResult.CANCELLED)
            else:
                outgoing.set_outcome(MigrationResult.MOVED if moved else MigrationResult.CANCELLED)
                actions.append(self.close(outgoing, now))
        return actions

    def abort_broken(self, now: float, result: MigrationResult = MigrationResult.FINISHED) -> list[Action]:
        """Give up the moves whose request has lost its KV or has ended; `result` says how it ended."""
        active = [o for o in self.outgoing.values() if not o.frozen and o.phase is not Phase.ABORTING]
        return [action for o in active if not self.is_intact(o) for action in self._abort(o, now, result)]

    def _abort(
        self, outgoing: Outgoing, now: float, result: MigrationResult = MigrationResult.FINISHED
    ) -> list[Action]:
        """Give up a move. Aborted is sent only when no copy of the move writes at the destination any more."""
        preempted = outgoing.request.preemptions != outgoing.preemptions
        outgoing.set_outcome(MigrationResult.PREEMPTED if preempted else result)
        if outgoing.phase in (Phase.COPYING, Phase.COPYING_TAIL):
            outgoing.phase = Phase.ABORTING
            return []
        return self.end(outgoing, now)

    def end(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Send Aborted and close the move."""
        return [_aborted(outgoing), self.close(outgoing, now)]

    def close(self, outgoing: Outgoing, now: float) -> Action:
        """Forget the move and report it."""
        del self.outgoing[outgoing.move]
        self._scheduler.unpause(outgoing.request)  # it may have been about to be frozen
        result, detail = outgoing.outcome
        return Report(
            request=outgoing.request,
            to=outgoing.peer.engine,
            reason=outgoing.reason,
            result=result,
            detail=detail,
            num_copies=outgoing.num_copies,
            blocks=outgoing.copied,
            skipped=outgoing.skipped,
            seconds=now - outgoing.began,
            frozen_seconds=now - outgoing.frozen_at if outgoing.frozen_at >= 0 else 0.0,
        )


def _aborted(outgoing: Outgoing) -> Action:
    return Send(outgoing.peer, Aborted(outgoing.move, outgoing.request.rid, outgoing.request.epoch))
