"""Live migration of running requests: one engine's side of the protocol. Pure.

Every method takes an event and returns the actions that the worker executes, in order. A move goes through these
steps, from source to destination:

1. `Reserve`: the destination reserves a place in its batch and blocks, and answers with the block ids.
2. `Copy`: full blocks are copied while the request decodes. The blocks that it fills meanwhile are copied next.
3. When little is left, the source *freezes* the request between two steps: the request is in no batch, cannot be
   preempted, and keeps its blocks. The source copies the rest, then sends `Handover`.
4. The destination holds the request as *pending* and sends `Takeover` to the frontend. `Grant` makes an engine the
   owner, `Release` frees what the other engine holds.

These rules make the protocol sound. Only the frontend raises an epoch. A frozen request never runs again without
the frontend's Grant: the source sends `Reclaim`, and the first claim that reaches the frontend wins. Blocks that a
source may still write are freed only on its `Aborted`, which it sends after its copies have ended, or on its
confirmed death.

The worker must: pass all messages of a peer before its death; call `after_step` when the emissions of the step are
queued for the frontends; answer each `Copy` with `copied` or `copy_failed` once nothing writes for it any more; call
`tick` regularly, also when idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from daemon.engine.migration.actions import Action, Journals, Report, Tell
from daemon.engine.migration.destination import MAX_INCOMING, Destination, Incoming
from daemon.engine.migration.source import MAX_OUTGOING, PATIENCE, WITH_COPY, Outgoing, Source
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
    OwnedRequests,
    Refused,
    Reserve,
    Reserved,
    ToPeer,
)


def _always_busier(peer: EngineIncarnation) -> bool:
    return True


def _always_the_same(peer: EngineIncarnation) -> bool:
    return True


def _never_refused(peer: EngineIncarnation) -> str:
    return ""


class Llumlet:
    """The moves of one engine: orders, events from peers and frontends, time.

    `is_busier_than` returns True while this engine has more to do than a peer. It is called before each move of a
    standing order that is not a drain, so that a source does not give away too much before the lease ends.
    `copy_refusal` returns why no block can be copied to a peer now, or "". A standing order waits for it to change;
    an order to move one request ends with it. `has_same_weights` returns True if a peer has this engine's weights: a
    request with output ends on the weights it began with, so it is not handed back for a peer with other ones.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        journals: Journals,
        *,
        max_outgoing: int = MAX_OUTGOING,
        max_incoming: int = MAX_INCOMING,
        patience: float = PATIENCE,
        is_busier_than: Callable[[EngineIncarnation], bool] = _always_busier,
        copy_refusal: Callable[[EngineIncarnation], str] = _never_refused,
        has_same_weights: Callable[[EngineIncarnation], bool] = _always_the_same,
    ) -> None:
        self.scheduler = scheduler
        self.source = Source(scheduler, journals, max_outgoing=max_outgoing, patience=patience)
        self.destination = Destination(scheduler, journals, max_incoming=max_incoming)
        self.orders: dict[EngineIncarnation, MigrateTo] = {}
        self._is_busier_than = is_busier_than
        self._copy_refusal = copy_refusal
        self._has_same_weights = has_same_weights

    # -- facts ---------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        """True while the engine takes in moves."""
        return self.destination.accepting

    @property
    def outgoing(self) -> dict[int, Outgoing]:
        """Moves away from this engine, by move number."""
        return self.source.outgoing

    @property
    def incoming(self) -> dict[tuple[EngineIncarnation, int], Incoming]:
        """Moves to this engine, by source and the source's move number."""
        return self.destination.incoming

    @property
    def pending(self) -> list[Request]:
        """Requests that were handed over to this engine and wait for their Grant."""
        return self.destination.pending

    @property
    def frozen(self) -> list[Request]:
        """Requests of this engine that wait for the frontend's decision."""
        return self.source.frozen

    @property
    def idle(self) -> bool:
        """True if no move is in progress and none is ordered."""
        return not (self.outgoing or self.incoming or self.orders)

    def tables(self) -> list[list[int]]:
        """Return the block tables held outside the batch, for `Scheduler.check`."""
        return [r.block_table for r in self.frozen] + [i.table for i in self.incoming.values()]

    def epoch_of(self, rid: int) -> int:
        """Return the newest epoch at which this engine holds the request; 0 if it does not. A reservation does not
        count."""
        held = [r.epoch for r in (*self.pending, *self.frozen) if r.rid == rid]
        running = self.scheduler.get(rid)
        return max(held + ([running.epoch] if running else []), default=0)

    # -- orders --------------------------------------------------------------------------------

    def migrate_to(self, peer: EngineIncarnation, order: MigrateTo, now: float) -> list[Action]:
        """Follow an order of the coordinator. `peer` is the live incarnation of the engine that the order names.

        A new order to a peer replaces the old one. An order to drain applies only while the engine accepts nothing.
        """
        if order.rid:
            request = self.scheduler.get(order.rid)
            if request is None or self.source.is_moving(request):
                return []
            return self._move_away(request, peer, order, now)
        if order.drain and self.accepting:
            return []  # the order was sent before the engine became SERVING again
        self.orders[peer] = order
        return self._follow_orders(now)

    def accept(self, accepting: bool) -> None:
        """Accept moves to this engine, or decline them. Accepting again cancels all orders to drain."""
        self.destination.accepting = accepting
        if accepting:
            self.orders = {peer: order for peer, order in self.orders.items() if not order.drain}

    def stop(self, peer: EngineIncarnation) -> None:
        """Begin no more moves to `peer`; the moves in progress continue."""
        self.orders.pop(peer, None)

    def _follow_orders(self, now: float) -> list[Action]:
        """Begin the moves that the standing orders allow: one at a time for each order, several for a drain."""
        actions: list[Action] = []
        self.orders = {peer: order for peer, order in self.orders.items() if now < order.lease}
        for peer, order in self.orders.items():
            if order.drain:
                actions += self._hand_back_waiting(peer, order)
            if self._copy_refusal(peer):
                continue
            while self.source.may_begin(peer, drain=order.drain) and (request := self._choose(order)):
                if not (order.drain or self._is_busier_than(peer)):
                    break
                actions += self._move_away(request, peer, order, now)
        return actions

    def _choose(self, order: MigrateTo) -> Request | None:
        """Choose a decoding request of the least urgent class. Urgent requests leave only for a drain."""
        moving = {o.request.rid for o in self.outgoing.values()}
        fit = [r for r in self.scheduler.running.values() if r.rid not in moving and (order.drain or r.pending == 1)]
        fit = [r for r in fit if order.drain or r.params.priority >= 0]
        if not fit:
            return None
        least_urgent = max(r.params.priority for r in fit)
        fit = [r for r in fit if r.params.priority == least_urgent]
        match order.choice:
            case MigrationChoice.LAST:
                return fit[-1]
            case MigrationChoice.LONGEST:
                return max(fit, key=lambda r: len(r.tokens))
            case _:
                return min(fit, key=lambda r: len(r.tokens))

    def _move_away(self, request: Request, peer: EngineIncarnation, order: MigrateTo, now: float) -> list[Action]:
        """Move a request, or hand it back if it has no KV worth a copy."""
        if not self._may_continue(request, peer):
            return [_declined(request, peer, order, "that engine has other weights than its output came from")]
        if request.rid not in self.scheduler.running:
            return self._hand_back(request, order, "it waited")
        if request.pending > 1 and request.num_computed < self.scheduler.blocks.block_size:
            return self._hand_back(request, order, "its prefill had barely begun")
        if order.how == MigrationMode.RECOMPUTE:
            return self._hand_back(request, order, "its KV is to be recomputed")
        if refusal := self._copy_refusal(peer):
            return [_declined(request, peer, order, refusal)]
        return self.source.begin(request, peer, order, now)

    def _may_continue(self, request: Request, peer: EngineIncarnation) -> bool:
        return not request.num_output or self._has_same_weights(peer)

    def _hand_back_waiting(self, peer: EngineIncarnation, order: MigrateTo) -> list[Action]:
        """Hand waiting requests back to their frontends, which start them on `peer` or other engines."""
        waiting = [request for request in self.scheduler.waiting if self._may_continue(request, peer)]
        return [action for request in waiting for action in self._hand_back(request, order, "it waited")]

    def _hand_back(self, request: Request, order: MigrateTo, detail: str) -> list[Action]:
        self.scheduler.cancel(request.rid, request.epoch)
        message = HandBack(request.rid, request.epoch)
        report = Report(
            request=request, to=-1, reason=order.reason, result=MigrationResult.HANDED_BACK, detail=detail
        )
        return [Tell(request.frontend, message), report]

    # -- steps and copies of this engine ---------------------------------------------------------

    def after_step(self, emissions: Iterable[Emission], now: float, step_seconds: float = 0.0) -> list[Action]:
        """Handle the end of a step: its emissions are queued for the frontends, and no other step has begun.

        `step_seconds`: duration of a step. A request is frozen when the rest of its KV copies faster than that.
        """
        return self.source.after_step(emissions, now, step_seconds) + self._follow_orders(now)

    def copied(self, move: int, now: float) -> list[Action]:
        """Handle the end of the move's copy. Return no action if the move is over."""
        return self.source.on_copied(move, now)

    def copy_failed(self, move: int, now: float) -> list[Action]:
        """Handle a copy that ended before every block had arrived. The order ends with it."""
        outgoing = self.outgoing.get(move)
        if outgoing is None or outgoing.phase not in WITH_COPY:
            return []
        self.stop(outgoing.peer)
        return self.source.on_copy_failed(outgoing, now)

    def tick(self, now: float) -> list[Action]:
        """Reclaim the requests that wait too long for a decision. Call it regularly, also when idle."""
        return self.source.tick(now) + self._follow_orders(now)

    # -- events from peers -----------------------------------------------------------------------

    def on_peer(self, peer: EngineIncarnation, message: ToPeer, now: float) -> list[Action]:
        """Handle a message of another engine."""
        match message:
            case Reserve():
                return self.destination.on_reserve(peer, message)
            case Reserved():
                return self.source.on_reserved(message, now)
            case Declined():
                return self._on_declined(message, now)
            case Handover():
                return self.destination.on_handover(peer, message)
            case Aborted(move=move):
                self.destination.free(peer, move)
        return []

    def _on_declined(self, answer: Declined, now: float) -> list[Action]:
        """Handle a refusal of the destination. The order ends with it."""
        outgoing = self.outgoing.get(answer.move)
        if outgoing is None:
            return []
        self.stop(outgoing.peer)
        return self.source.on_declined(outgoing, answer.reason, now)

    def on_peer_death(self, peer: EngineIncarnation, now: float) -> list[Action]:
        """Handle the death of this incarnation of an engine and all earlier ones. All their messages must have been
        passed before. Requests that are pending here stay pending."""

        def is_dead(other: EngineIncarnation) -> bool:
            return other.engine == peer.engine and other.incarnation <= peer.incarnation

        self.orders = {other: order for other, order in self.orders.items() if not is_dead(other)}
        self.destination.on_peer_death(is_dead)
        return self.source.on_peer_death(is_dead, now)

    # -- events from frontends -------------------------------------------------------------------

    def on_start(self, request: Request, now: float) -> list[Action]:
        """Queue a request, unless it is here at this epoch or a newer one. Refuse a request that can never run."""
        if reason := self.scheduler.refuse(request):
            return [Tell(request.frontend, Refused(request.rid, request.epoch, reason))]
        if self.epoch_of(request.rid) >= request.epoch:
            return []
        actions = self.on_release(request.rid, request.epoch - 1, now)
        self.scheduler.add(request)
        return actions

    def on_grant(self, rid: int, epoch: int, new_epoch: int, now: float) -> list[Action]:
        """Run the request that is frozen or pending at exactly `epoch`; its epoch becomes `new_epoch`."""
        for outgoing in self.outgoing.values():
            if outgoing.frozen and outgoing.request.rid == rid and outgoing.request.epoch == epoch:
                self._attach(outgoing.request, new_epoch, now)
                return [self.source.close(outgoing, now)]
        request = self.destination.take_granted(rid, epoch)
        if request is not None:
            self._attach(request, new_epoch, now)
        return []

    def _attach(self, request: Request, epoch: int, now: float) -> None:
        request.epoch = epoch
        if request.admitted < 0:
            request.admitted = now
        self.scheduler.attach(request)

    def on_release(self, rid: int, epoch: int, now: float, *, cancelled: bool = False) -> list[Action]:
        """Handle Release or, if `cancelled`, Cancel: drop `rid` at `epoch` or older, in any state.

        A reservation is not dropped: its source aborts it.
        """
        return self._drop(lambda r: r.rid == rid and r.epoch <= epoch, now, moved=not cancelled)

    def on_reprioritise(self, rid: int, epoch: int, priority: int) -> None:
        """Give the request that is held at exactly `epoch`, in any state, another class.

        A copy at an older epoch never runs again, and no copy at a newer one exists: see `control.policy.ownership`.
        """
        here = self.scheduler.get(rid)
        for request in (*self.frozen, *self.pending, *([here] if here else [])):
            if (request.rid, request.epoch) == (rid, epoch):
                self.scheduler.reprioritise(request, priority)

    def on_owned_requests(self, frontend: int, message: OwnedRequests, now: float) -> list[Action]:
        """Compare with all requests that a frontend, perhaps the successor of a dead one, has given to this engine.

        A Grant that was lost takes effect now. Drop each request that the message omits; hand back each that it
        names and this engine lacks; claim again what waits for a decision. A pending request is not dropped although
        another engine still owns it: its claim may be on its way.
        """
        owned = dict(zip(message.rids, message.epochs, strict=True))
        actions: list[Action] = []
        for rid, epoch, accepted in zip(message.rids, message.epochs, message.accepted, strict=True):
            actions += self._grant_lost(rid, epoch, accepted, now)

        def concerns(request: Request) -> bool:
            return request.frontend == frontend and message.first <= request.rid <= message.last

        def is_older(request: Request) -> bool:
            return concerns(request) and request.epoch < owned.get(request.rid, 0)

        def is_not_owned(request: Request) -> bool:
            return concerns(request) and (request.rid not in owned or is_older(request))

        self.destination.drop_pending(is_older)
        actions += self._drop_scheduled(is_not_owned, now, moved=False)
        actions += self.source.claim_again(concerns) + self.destination.claim_again(concerns)
        for rid, epoch, priority in zip(message.rids, message.epochs, message.priorities, strict=True):
            if self.epoch_of(rid) < epoch:
                actions.append(Tell(frontend, HandBack(rid, epoch)))
            else:
                self.on_reprioritise(rid, epoch, priority)
        return actions

    def _grant_lost(self, rid: int, epoch: int, accepted: int, now: float) -> list[Action]:
        """Run a request that waits here for the Grant to `epoch`, if its output is exactly what is accepted."""
        held = self.epoch_of(rid)
        waiting = [r for r in (*self.source.undecided, *self.pending) if (r.rid, r.epoch) == (rid, held)]
        if not waiting or held >= epoch or waiting[0].num_output != accepted:
            return []
        return self.on_grant(rid, held, epoch, now)

    def _drop(self, should_drop: Callable[[Request], bool], now: float, *, moved: bool) -> list[Action]:
        """Free the requests that match, in any state. `moved`: the destination owns those that were handed over."""
        self.destination.drop_pending(should_drop)
        return self._drop_scheduled(should_drop, now, moved=moved)

    def _drop_scheduled(self, should_drop: Callable[[Request], bool], now: float, *, moved: bool) -> list[Action]:
        """Free the requests that match and run, wait or are frozen here."""
        scheduler = self.scheduler
        actions = self.source.drop_frozen(should_drop, now, moved=moved)
        for request in [r for r in (*scheduler.running.values(), *scheduler.waiting) if should_drop(r)]:
            scheduler.cancel(request.rid, request.epoch)
        return actions + self.source.abort_broken(now, MigrationResult.CANCELLED)


def _declined(request: Request, peer: EngineIncarnation, order: MigrateTo, why: str) -> Report:
    result = MigrationResult.DECLINED
    return Report(request=request, to=peer.engine, reason=order.reason, result=result, detail=why)
