"""Moves requests between engines while they run: one engine's side of the protocol. Pure.

Every method takes an event and returns the actions that the worker carries out, in order. A move, source to
destination, in stages:

1. `Reserve`: the destination keeps a place in its batch and blocks, and answers with their ids;
2. `Copy`: full blocks go over while the request decodes; what it writes meanwhile makes the next stage;
3. when little is left the source *freezes* the request between two steps: it is in no batch, cannot be
   preempted, and keeps its blocks. The rest is copied, then `Handover` tells the destination;
4. the destination holds it *pending* and asks the frontend (`Takeover`). `Grant` makes it the owner, `Release`
   frees what the loser holds.

What keeps it sound: nobody but the frontend raises an epoch. A frozen request never runs again by itself: the
source asks (`Reclaim`), and whoever reaches the frontend first wins. Blocks that a source may still write are
freed on its `Aborted`, sent after its copies have ended, or on its confirmed death, and on nothing else.

The worker's duties: hand over a peer's messages to their end before its death; call `after_step` when the
step's emissions are on their way to the frontends; answer each `Copy` with `copied` or `copy_failed`, once
nothing of it is written any more; call `tick` now and then, also when idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from daemon.engine.request import Request
from daemon.engine.scheduler import Emission, Scheduler
from daemon.enums import MigrationChoice, MigrationMode, MigrationResult
from daemon.ipc.messages import (
    Aborted,
    Declined,
    EngineIncarnation,
    HandBack,
    Handover,
    MigrateTo,
    Reclaim,
    Reserve,
    Reserved,
    Takeover,
    TokenLogprobs,
    ToPeer,
)

MAX_OUTGOING = 4  # moves at once
MAX_INCOMING = 8
MAX_STAGES = 8  # a request that writes faster than it is copied is frozen after so many
PATIENCE = 1.0  # seconds that a frozen request waits for the verdict before it asks for it
ABSENT = 0  # in a table at the source: a block that need not be copied (0 is nobody's block)


class Send(NamedTuple):
    """Put `message` on the ring to that life of the engine; drop it if it is over."""

    peer: EngineIncarnation
    message: ToPeer


class Tell(NamedTuple):
    """Put `message` on the ring to the frontend."""

    frontend: int
    message: Takeover | Reclaim | HandBack


class Copy(NamedTuple):
    """Copy blocks (here, there) into the peer's pool beside the steps; then call `copied` or `copy_failed`."""

    peer: EngineIncarnation
    move: int
    pairs: list[tuple[int, int]]


class Report(NamedTuple):
    """For the record: a move, or an order to move, is over. Times in seconds."""

    request: Request
    to: int  # engine; -1: wherever its frontend likes
    reason: str  # of the order
    result: MigrationResult
    detail: str = ""
    stages: int = 0  # copies begun
    blocks: int = 0  # copied
    skipped: int = 0  # blocks that the destination had
    seconds: float = 0.0
    frozen_seconds: float = 0.0


Action = Send | Tell | Copy | Report


class Journals(Protocol):
    """What the llumlet reads of the frontends' journals."""

    def accepted(self, request: Request) -> int:
        """Output tokens of the request that its frontend has journaled; -1 if its slot is another request's."""
        ...

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        """The request with its journaled output; None unless the slot stands for it at this very epoch."""
        ...


class Stage(Enum):
    """How far an outgoing move is. Frozen from TAIL on, but for DOOMED."""

    RESERVING = auto()  # waits for Reserved
    COPYING = auto()  # full blocks are on their way
    READY = auto()  # waits for the end of a step
    TAIL = auto()  # frozen; the rest is on its way
    HANDED = auto()  # frozen; Handover sent
    ASKING = auto()  # frozen; AskBack sent
    DOOMED = auto()  # given up; waits for its copy to end before Aborted


FROZEN = frozenset({Stage.TAIL, Stage.HANDED, Stage.ASKING})


class OutputTail(NamedTuple):
    """Output from position `start` on."""

    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


@dataclass(slots=True, eq=False)
class Outgoing:
    """A move away from here. `table` mirrors the destination's; its first `sent` blocks need no copy."""

    move: int
    peer: EngineIncarnation
    request: Request
    preemptions: int  # of the request when the move began: one more and its KV is gone
    first: int  # output position from which on `logprobs` is kept
    reason: str  # of the order
    began: float  # seconds
    blocking: bool = False  # freeze first and copy then: what live migration is compared with
    stage: Stage = Stage.RESERVING
    round: int = 0  # the protocol's stage number
    table: list[int] = field(default_factory=list)
    sent: int = 0
    copying: int = 0  # blocks that will need no copy when the one under way has ended
    since: float = 0.0  # start of the stage, seconds
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    records: OutputTail = OutputTail(0, [], None)  # settled at the freeze
    stages: int = 0  # copies begun
    copied: int = 0  # blocks
    skipped: int = 0  # blocks that were there
    froze: float = -1.0  # when, seconds
    fate: tuple[MigrationResult, str] = (
        MigrationResult.TAKEN_BACK,
        "",
    )  # how it will end, and why: the first cause counts

    @property
    def frozen(self) -> bool:
        return self.stage in FROZEN

    def settle(self, result: MigrationResult, detail: str = "") -> None:
        """Note what its end will be; a second cause changes nothing."""
        if self.fate[0] is MigrationResult.TAKEN_BACK:
            self.fate = result, detail


@dataclass(slots=True, eq=False)
class Incoming:
    """A move to here: a reservation, and once it is handed over the pending request."""

    peer: EngineIncarnation
    reserve: Reserve
    table: list[int]
    request: Request | None = None  # pending


def _always(peer: EngineIncarnation) -> bool:
    return True


class Llumlet:
    """The moves of one engine.

    `busier_than` tells whether this engine still has more to do than a peer; asked before each move of a standing
    order that is no drain, so that a source does not give away more than evens them out before its lease ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        journals: Journals,
        *,
        max_outgoing: int = MAX_OUTGOING,
        max_incoming: int = MAX_INCOMING,
        patience: float = PATIENCE,
        busier_than: Callable[[EngineIncarnation], bool] = _always,
    ) -> None:
        self.scheduler = scheduler
        self.journals = journals
        self.max_outgoing = max_outgoing
        self.max_incoming = max_incoming
        self.patience = patience
        self.busier_than = busier_than
        self.accepting = True
        self.outgoing: dict[int, Outgoing] = {}  # by move
        self.incoming: dict[tuple[EngineIncarnation, int], Incoming] = {}  # by source and its move
        self.orders: dict[EngineIncarnation, MigrateTo] = {}
        self._moves = 0
        self._block_seconds = 0.0  # of copying one block, as last seen; 0: not seen yet

    # -- facts ---------------------------------------------------------------------------------

    @property
    def pending(self) -> list[Request]:
        """Requests handed over to here that wait for their grant."""
        return [i.request for i in self.incoming.values() if i.request is not None]

    @property
    def frozen(self) -> list[Request]:
        """Requests of here that wait for the frontend's verdict."""
        return [o.request for o in self.outgoing.values() if o.frozen]

    @property
    def idle(self) -> bool:
        """No move is under way and none is ordered."""
        return not (self.outgoing or self.incoming or self.orders)

    def tables(self) -> list[list[int]]:
        """Block tables held outside the batch, for `Scheduler.check`."""
        return [r.block_table for r in self.frozen] + [i.table for i in self.incoming.values()]

    def epoch_of(self, rid: int) -> int:
        """Newest epoch at which the request is held here; 0 if it is not. A mere reservation does not count."""
        held = [r.epoch for r in (*self.pending, *self.frozen) if r.rid == rid]
        running = self.scheduler.get(rid)
        return max(held + ([running.epoch] if running else []), default=0)

    # -- orders --------------------------------------------------------------------------------

    def migrate_to(self, peer: EngineIncarnation, order: MigrateTo, now: float) -> list[Action]:
        """The coordinator's order; `peer` is the engine it names, as alive now. A new one replaces the old; one to
        drain is for an engine that takes in no more."""
        if order.rid:
            request = self.scheduler.get(order.rid)
            if request is None or self._moves_already(request):
                return []
            return self._send_off(request, peer, now, order)
        if order.drain and self.accepting:
            return []  # it was sent before the engine was to serve again
        self.orders[peer] = order
        return self._pursue(now)

    def accept(self, yes: bool) -> None:
        """Take in requests, or no more. Whoever does drains no longer, whatever was ordered."""
        self.accepting = yes
        if yes:
            self.orders = {peer: order for peer, order in self.orders.items() if not order.drain}

    def stop(self, peer: EngineIncarnation) -> None:
        """Begin no more moves to `peer`; those under way go on."""
        self.orders.pop(peer, None)

    def _pursue(self, now: float) -> list[Action]:
        """Begin what the standing orders allow: one move at a time each, several for a drain."""
        actions: list[Action] = []
        self.orders = {peer: order for peer, order in self.orders.items() if now < order.lease}
        for peer, order in self.orders.items():
            if order.drain:
                actions += self._hand_back_all(order)
            while self._may_begin(peer, order) and (request := self._choose(order)):
                if not (order.drain or self.busier_than(peer)):
                    break
                actions += self._send_off(request, peer, now, order)
        return actions

    def _may_begin(self, peer: EngineIncarnation, order: MigrateTo) -> bool:
        if len(self.outgoing) >= self.max_outgoing:
            return False
        busy = any(o.peer == peer for o in self.outgoing.values())
        return order.drain or not busy

    def _moves_already(self, request: Request) -> bool:
        return any(o.request is request for o in self.outgoing.values())

    def _choose(self, order: MigrateTo) -> Request | None:
        """A decoding request of the least urgent class; urgent ones stay unless the engine is drained."""
        moving = {o.request.rid for o in self.outgoing.values()}
        fit = [r for r in self.scheduler.running.values() if r.rid not in moving and (order.drain or r.pending == 1)]
        fit = [r for r in fit if order.drain or r.params.priority >= 0]
        if not fit:
            return None
        least = max(r.params.priority for r in fit)
        fit = [r for r in fit if r.params.priority == least]
        match order.choice:
            case MigrationChoice.LAST:
                return fit[-1]
            case MigrationChoice.LONGEST:
                return max(fit, key=lambda r: len(r.tokens))
            case _:
                return min(fit, key=lambda r: len(r.tokens))

    def _hand_back_all(self, order: MigrateTo) -> list[Action]:
        """Let the frontends start elsewhere whatever waits here."""
        waiting = list(self.scheduler.waiting)
        return [action for request in waiting for action in self._hand_back(request, order, "it waited")]

    def _hand_back(self, request: Request, order: MigrateTo, why: str) -> list[Action]:
        self.scheduler.cancel(request.rid, request.epoch)
        told = Tell(request.frontend, HandBack(request.rid, request.epoch))
        return [told, Report(request, -1, order.reason, MigrationResult.HANDED_BACK, why)]

    # -- source --------------------------------------------------------------------------------

    def _send_off(self, request: Request, peer: EngineIncarnation, now: float, order: MigrateTo) -> list[Action]:
        """Move a request, or hand it back where there is no KV worth moving."""
        if request.rid not in self.scheduler.running:
            return self._hand_back(request, order, "it waited")
        if request.pending > 1 and request.num_computed < self.scheduler.blocks.block_size:
            return self._hand_back(request, order, "its prefill had barely begun")
        if order.how == MigrationMode.RECOMPUTE:
            return self._hand_back(request, order, "to be computed anew")
        self._moves += 1
        outgoing = Outgoing(
            self._moves,
            peer,
            request,
            request.preemptions,
            request.num_output,
            order.reason,
            now,
            order.how == MigrationMode.BLOCKING,
        )
        self.outgoing[outgoing.move] = outgoing
        return [self._reserve(outgoing, now)]

    def _reserve(self, outgoing: Outgoing, now: float) -> Action:
        """Ask for room for what is there and a block more, so that the freeze need not wait for an answer."""
        request, scheduler = outgoing.request, self.scheduler
        longest = min(request.last_position, scheduler.max_len)
        outgoing.stage, outgoing.since = Stage.RESERVING, now
        message = Reserve(
            move=outgoing.move,
            rid=request.rid,
            epoch=request.epoch,
            frontend=request.frontend,
            slot=request.slot,
            stage=outgoing.round,
            num_tokens=min(len(request.tokens) + scheduler.blocks.block_size, longest),
            longest=longest,
            hashes=[] if outgoing.round else scheduler.prefix_hashes(request),
        )
        return Send(outgoing.peer, message)

    def _reserved(self, answer: Reserved, now: float) -> list[Action]:
        outgoing = self.outgoing.get(answer.move)
        if outgoing is None or outgoing.stage is not Stage.RESERVING or outgoing.round != answer.stage:
            return []
        if not self._intact(outgoing):
            return self._abort(outgoing, now)
        if answer.stage == 0:
            outgoing.table = [ABSENT] * answer.skip
            outgoing.sent = outgoing.skipped = answer.skip
        outgoing.table += answer.blocks
        outgoing.round += 1
        outgoing.stage = Stage.READY
        return [] if outgoing.blocking else self._copy_full(outgoing, now)

    def _copy_full(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Copy what is full and has room there: it does not change any more. Nothing, if there is none."""
        full = outgoing.request.num_computed // self.scheduler.blocks.block_size
        return self._copy(outgoing, min(full, len(outgoing.table)), Stage.COPYING, now)

    def _copy(self, outgoing: Outgoing, upto: int, stage: Stage, now: float) -> list[Action]:
        if upto <= outgoing.sent:
            return []
        pairs = zip(
            outgoing.request.block_table[outgoing.sent : upto], outgoing.table[outgoing.sent : upto], strict=True
        )
        outgoing.stage, outgoing.copying, outgoing.since = stage, upto, now
        outgoing.stages += 1
        return [Copy(outgoing.peer, outgoing.move, list(pairs))]

    def copied(self, move: int, now: float) -> list[Action]:
        """The move's copy has ended. Of a move that is over, nothing follows."""
        outgoing = self.outgoing.get(move)
        if outgoing is None:
            return []
        match outgoing.stage:
            case Stage.DOOMED:
                outgoing.copied += outgoing.copying - outgoing.sent
                return self._end(outgoing, now)
            case Stage.COPYING:
                self._note_copy(outgoing, now)
                outgoing.stage = Stage.READY
                return [] if self._intact(outgoing) else self._abort(outgoing, now)
            case Stage.TAIL:
                self._note_copy(outgoing, now)
                return self._hand_over(outgoing, now)
        return []

    def copy_failed(self, move: int, now: float) -> list[Action]:
        """The move's copy has ended, and not everything arrived. The request stays here, if the frontend agrees."""
        outgoing = self.outgoing.get(move)
        if outgoing is None or outgoing.stage not in (Stage.COPYING, Stage.TAIL, Stage.DOOMED):
            return []
        self.stop(outgoing.peer)
        outgoing.settle(MigrationResult.COPY_FAILED)
        if outgoing.stage is not Stage.TAIL:
            return self._end(outgoing, now)
        return [self._aborted(outgoing), *self._reclaim(outgoing)]

    def _note_copy(self, outgoing: Outgoing, now: float) -> None:
        blocks = outgoing.copying - outgoing.sent
        self._block_seconds = (now - outgoing.since) / blocks
        outgoing.sent = outgoing.copying
        outgoing.copied += blocks

    def after_step(self, emissions: Iterable[Emission], now: float, step_seconds: float = 0.0) -> list[Action]:
        """A step has ended, its emissions are queued for the frontends, and no other has begun.

        `step_seconds`: what a step takes; a rest that copies faster is small enough to freeze for.
        """
        self._keep_logprobs(emissions)
        actions = self._abort_broken(now)
        for outgoing in [o for o in self.outgoing.values() if o.stage is Stage.READY]:
            actions += self._proceed(outgoing, now, step_seconds)
        return actions + self._pursue(now)

    def _abort_broken(self, now: float, ended: MigrationResult = MigrationResult.FINISHED) -> list[Action]:
        """Give up the moves whose request has ended, how says `ended`, or lost its KV."""
        going = [o for o in self.outgoing.values() if not o.frozen and o.stage is not Stage.DOOMED]
        return [action for o in going if not self._intact(o) for action in self._abort(o, now, ended)]

    def _keep_logprobs(self, emissions: Iterable[Emission]) -> None:
        """Logprobs are in no request: keep those that the journal may lack at the freeze."""
        wanting = {o.request.rid: o for o in self.outgoing.values() if o.request.sampling.logprobs >= 0}
        if not wanting:
            return
        for emission in emissions:
            outgoing = wanting.get(emission.request.rid)
            if outgoing is not None and outgoing.request is emission.request:
                outgoing.logprobs += emission.logprobs or [None] * len(emission.tokens)

    def _intact(self, outgoing: Outgoing) -> bool:
        """Whether the request still runs here on the KV it had when the move began."""
        request = outgoing.request
        return self.scheduler.running.get(request.rid) is request and request.preemptions == outgoing.preemptions

    def _proceed(self, outgoing: Outgoing, now: float, step_seconds: float) -> list[Action]:
        """Freeze, copy another stage, or ask for more room."""
        blocks, request = self.scheduler.blocks, outgoing.request
        if request.held:  # settled already; nothing but the step that has just been folded held it up
            return self._freeze(outgoing, now)
        if blocks.blocks_for(request.length) > len(outgoing.table):
            return [self._reserve(outgoing, now)]
        left = blocks.blocks_for(request.num_computed) - outgoing.sent
        small = left <= 1 or left * self._block_seconds < step_seconds
        if outgoing.blocking or small or outgoing.round >= MAX_STAGES:
            return self._freeze(outgoing, now)
        outgoing.round += 1
        return self._copy_full(outgoing, now)

    def _freeze(self, outgoing: Outgoing, now: float) -> list[Action]:
        """Take the request out of the batch and send the rest. Not before the journal holds what it had emitted
        when the move began: of that no logprobs were kept. Nor while a step in flight contains it: then it is left
        out of the next, and frozen when that one is folded."""
        request = outgoing.request
        start = self.journals.accepted(request)
        if start < outgoing.first:
            return []
        if request.in_flight:
            self.scheduler.hold(request)
            return []
        logprobs = outgoing.logprobs[start - outgoing.first :] if request.sampling.logprobs >= 0 else None
        outgoing.records = OutputTail(start, request.tokens[request.prompt_len + start :], logprobs)
        self.scheduler.detach(request)
        outgoing.froze = now
        tail = self._copy(outgoing, self.scheduler.blocks.blocks_for(request.num_computed), Stage.TAIL, now)
        return tail or self._hand_over(outgoing, now)

    def _hand_over(self, outgoing: Outgoing, now: float) -> list[Action]:
        outgoing.stage, outgoing.since = Stage.HANDED, now
        request = outgoing.request
        message = Handover(
            outgoing.move,
            request.rid,
            request.epoch,
            request.num_computed,
            request.num_cached,
            *outgoing.records,
        )
        return [Send(outgoing.peer, message)]

    def _reclaim(self, outgoing: Outgoing) -> list[Action]:
        outgoing.stage = Stage.ASKING
        request = outgoing.request
        return [Tell(request.frontend, Reclaim(request.rid, request.epoch, *outgoing.records))]

    def _declined(self, answer: Declined, now: float) -> list[Action]:
        """The destination has no room, or nothing to put what was handed over into. The order is void with it."""
        outgoing = self.outgoing.get(answer.move)
        if outgoing is None:
            return []
        self.stop(outgoing.peer)
        outgoing.settle(MigrationResult.DECLINED, answer.reason)
        match outgoing.stage:
            case Stage.RESERVING:
                return self._end(outgoing, now)
            case Stage.HANDED:
                return self._reclaim(outgoing)
        return []

    def _abort(
        self, outgoing: Outgoing, now: float, ended: MigrationResult = MigrationResult.FINISHED
    ) -> list[Action]:
        """Give up a move; the destination hears it once nothing is written there any more."""
        lost = outgoing.request.preemptions != outgoing.preemptions
        outgoing.settle(MigrationResult.PREEMPTED if lost else ended)
        if outgoing.stage in (Stage.COPYING, Stage.TAIL):
            outgoing.stage = Stage.DOOMED
            return []
        return self._end(outgoing, now)

    def _end(self, outgoing: Outgoing, now: float) -> list[Action]:
        return [self._aborted(outgoing), self._close(outgoing, now)]

    def _close(self, outgoing: Outgoing, now: float) -> Action:
        """The move is over."""
        del self.outgoing[outgoing.move]
        self.scheduler.release(outgoing.request)  # if it was about to be frozen
        return Report(
            outgoing.request,
            outgoing.peer.engine,
            outgoing.reason,
            *outgoing.fate,
            outgoing.stages,
            outgoing.copied,
            outgoing.skipped,
            now - outgoing.began,
            now - outgoing.froze if outgoing.froze >= 0 else 0.0,
        )

    def _aborted(self, outgoing: Outgoing) -> Action:
        return Send(outgoing.peer, Aborted(outgoing.move, outgoing.request.rid, outgoing.request.epoch))

    # -- destination -----------------------------------------------------------------------------

    def _admit(self, peer: EngineIncarnation, reserve: Reserve) -> list[Action]:
        known = self.incoming.get((peer, reserve.move))
        answer = self._extend(known, reserve) if known else self._open(peer, reserve)
        if isinstance(answer, str):
            return [Send(peer, Declined(reserve.move, reserve.rid, reserve.epoch, answer))]
        return [Send(peer, answer)]

    def _open(self, peer: EngineIncarnation, reserve: Reserve) -> Reserved | str:
        """Take a place and the blocks for a new move; those already here are held from now on."""
        blocks = self.scheduler.blocks
        if not self.accepting or reserve.stage:
            return "takes in nothing"
        if reserve.longest > self.scheduler.max_len:
            return f"{reserve.longest} tokens are more than fit here"
        if len(self.incoming) >= self.max_incoming:
            return f"{len(self.incoming)} requests are on their way already"
        matched = blocks.match(reserve.hashes) if blocks.prefix_caching else []
        fresh = blocks.blocks_for(reserve.num_tokens) - len(matched)
        if not self._has_room(fresh + blocks.num_idle(matched)):
            return "no KV blocks to spare"
        if not self.scheduler.reserve():
            return "the batch is full"
        blocks.acquire(matched)
        granted = self.scheduler.allocate_settled(fresh)
        self.incoming[peer, reserve.move] = Incoming(peer, reserve, matched + granted)
        return Reserved(reserve.move, reserve.rid, reserve.epoch, 0, len(matched), granted)

    def _extend(self, incoming: Incoming, reserve: Reserve) -> Reserved | str:
        blocks = self.scheduler.blocks
        fresh = max(0, blocks.blocks_for(reserve.num_tokens) - len(incoming.table))
        if not self._has_room(fresh):
            return "no KV blocks to spare"
        granted = self.scheduler.allocate_settled(fresh)
        incoming.table += granted
        return Reserved(reserve.move, reserve.rid, reserve.epoch, reserve.stage, 0, granted)

    def _has_room(self, fresh: int) -> bool:
        """Whether so many blocks can go, and each running request still has one to grow into and 1% stays free."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        kept = len(scheduler.running) + blocks.capacity // 100 + scheduler.num_unsettled
        return blocks.can_allocate(fresh + kept)

    def _take(self, peer: EngineIncarnation, handover: Handover) -> list[Action]:
        """All is here: hold the request pending and ask for it. What does not fit the journal is turned away."""
        incoming = self.incoming.get((peer, handover.move))
        request = self._rebuild(incoming, handover) if incoming else None
        if incoming is None or request is None:
            self._free(peer, handover.move)
            reason = "the request has moved on"
            return [Send(peer, Declined(handover.move, handover.rid, handover.epoch, reason))]
        incoming.request = request
        takeover = Takeover(request.rid, request.epoch, handover.start, handover.tokens, handover.logprobs)
        return [Tell(request.frontend, takeover)]

    def _rebuild(self, incoming: Incoming, handover: Handover) -> Request | None:
        """The request from its journal, the carried output, and the KV that was copied."""
        reserve = incoming.reserve
        request = self.journals.load(reserve.frontend, reserve.slot, reserve.rid, reserve.epoch)
        if request is None or request.num_output < handover.start:
            return None
        request.tokens[request.prompt_len + handover.start :] = handover.tokens
        request.slot = reserve.slot
        request.num_computed = handover.num_computed
        request.num_cached = handover.num_cached
        request.hashes = list(reserve.hashes)
        request.block_table = incoming.table
        return request

    def _free(self, peer: EngineIncarnation, move: int) -> None:
        """Give up a reservation or a pending request. Only where the source writes no more."""
        incoming = self.incoming.pop((peer, move), None)
        if incoming is not None:
            self.scheduler.blocks.free(incoming.table)
            self.scheduler.unreserve()

    # -- what peers say ----------------------------------------------------------------------------

    def on_peer(self, peer: EngineIncarnation, message: ToPeer, now: float) -> list[Action]:
        """A message of another engine."""
        match message:
            case Reserve():
                return self._admit(peer, message)
            case Reserved():
                return self._reserved(message, now)
            case Declined():
                return self._declined(message, now)
            case Handover():
                return self._take(peer, message)
            case Aborted(move=move):
                self._free(peer, move)
        return []

    def peer_died(self, peer: EngineIncarnation, now: float) -> list[Action]:
        """That life of an engine, and every one before it, is over, and their messages are all taken. What was
        pending here stays pending."""

        def dead(other: EngineIncarnation) -> bool:
            return other.engine == peer.engine and other.incarnation <= peer.incarnation

        self.orders = {other: order for other, order in self.orders.items() if not dead(other)}
        for incoming in [i for i in self.incoming.values() if dead(i.peer) and i.request is None]:
            self._free(incoming.peer, incoming.reserve.move)
        actions: list[Action] = []
        for outgoing in [o for o in self.outgoing.values() if dead(o.peer)]:
            outgoing.settle(MigrationResult.PEER_DIED)
            if not outgoing.frozen:
                actions.append(self._close(outgoing, now))
            elif outgoing.stage is not Stage.ASKING:
                actions += self._reclaim(outgoing)
        return actions

    # -- what frontends say ------------------------------------------------------------------------

    def on_start(self, request: Request, now: float) -> list[Action]:
        """Queue a request, unless it is here at this epoch or a newer one. Raises ValueError for what
        `Scheduler.refuse` refuses."""
        if self.epoch_of(request.rid) >= request.epoch:
            return []
        actions = self.on_release(request.rid, request.epoch - 1, now)
        self.scheduler.add(request)
        return actions

    def on_grant(self, rid: int, epoch: int, new_epoch: int, now: float) -> list[Action]:
        """What is frozen or pending at `epoch` runs from now on, at `new_epoch`."""
        for outgoing in self.outgoing.values():
            if outgoing.frozen and outgoing.request.rid == rid and outgoing.request.epoch == epoch:
                self._run(outgoing.request, new_epoch, now)
                return [self._close(outgoing, now)]
        for key, incoming in self.incoming.items():
            request = incoming.request
            if request is not None and request.rid == rid and request.epoch == epoch:
                del self.incoming[key]
                self._run(request, new_epoch, now)
                return []
        return []

    def _run(self, request: Request, epoch: int, now: float) -> None:
        request.epoch = epoch
        if request.admitted < 0:
            request.admitted = now
        self.scheduler.attach(request)

    def on_release(self, rid: int, epoch: int, now: float, *, cancelled: bool = False) -> list[Action]:
        """Release or, if `cancelled`, Cancel: drop `rid` at `epoch` or older, wherever it is. Of a reservation its
        source hears."""
        return self._drop(lambda r: r.rid == rid and r.epoch <= epoch, now, moved=not cancelled)

    def on_reprioritise(self, rid: int, epoch: int, priority: int) -> None:
        """What is held at exactly `epoch`, wherever it is, has another class from now on. A copy at an older epoch
        will never run again, and there is none at a newer one: see `control.ownership`."""
        here = self.scheduler.get(rid)
        for request in (*self.frozen, *self.pending, *([here] if here else [])):
            if (request.rid, request.epoch) == (rid, epoch):
                self.scheduler.reprioritise(request, priority)

    def on_owned_requests(self, frontend: int, owned: Mapping[int, int], now: float) -> list[Action]:
        """All that a frontend has given to this engine (rid: epoch). What it omits is dropped; what it names and
        is not here is handed back; what is frozen asks again, as nobody may remember that it did."""
        actions = self._drop(
            lambda r: r.frontend == frontend and r.epoch < owned.get(r.rid, r.epoch + 1), now, moved=False
        )
        for outgoing in self.outgoing.values():
            if outgoing.request.frontend == frontend and outgoing.stage in (Stage.HANDED, Stage.ASKING):
                actions += self._reclaim(outgoing)
        missing = [rid for rid, epoch in owned.items() if self.epoch_of(rid) < epoch]
        return actions + [Tell(frontend, HandBack(rid, owned[rid])) for rid in missing]

    def _drop(self, doomed: Callable[[Request], bool], now: float, *, moved: bool) -> list[Action]:
        """Free what is `doomed`. `moved`: of what was handed over, the destination has become the owner."""
        scheduler = self.scheduler
        actions: list[Action] = []
        for outgoing in [o for o in self.outgoing.values() if o.frozen and doomed(o.request)]:
            scheduler.discard(outgoing.request)
            actions += self._forget(outgoing, now, moved)
        for incoming in [i for i in self.incoming.values() if i.request is not None and doomed(i.request)]:
            self._free(incoming.peer, incoming.reserve.move)
        for request in [r for r in (*scheduler.running.values(), *scheduler.waiting) if doomed(r)]:
            scheduler.cancel(request.rid, request.epoch)
        return actions + self._abort_broken(now, MigrationResult.CANCELLED)

    def _forget(self, outgoing: Outgoing, now: float, moved: bool) -> list[Action]:
        """The frozen request is gone. What was handed over the frontend will refuse; what was not is aborted."""
        if outgoing.stage is Stage.TAIL:
            return self._abort(outgoing, now, MigrationResult.CANCELLED)
        outgoing.settle(MigrationResult.MOVED if moved else MigrationResult.CANCELLED)
        return [self._close(outgoing, now)]

    # -- time ----------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Time passes: who waits too long for a verdict asks for it. Call it now and then, idle or not."""
        actions = self._abort_broken(now)
        for outgoing in self.outgoing.values():
            if outgoing.stage is Stage.HANDED and now - outgoing.since >= self.patience:
                actions += self._reclaim(outgoing)
        return actions + self._pursue(now)
