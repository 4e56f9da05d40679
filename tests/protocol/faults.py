"""Worlds with one rule of the protocol broken. The explorer must object to each."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from daemon.control.policy import ownership
from daemon.engine.migration.llumlet import Action as Deed
from daemon.engine.migration.llumlet import Llumlet, Outgoing, Stage
from daemon.engine.request import Request
from daemon.enums import MigrationResult
from daemon.ipc.messages import EngineIncarnation, Release, Reprioritise, Reserve, Reserved
from tests.protocol.world import Action, Journals, World


def verdicts(**broken: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(ownership) | broken))


class UnfreezesItself(Llumlet):
    """Out of patience, it runs the frozen request again without asking."""

    def tick(self, now: float) -> list[Deed]:
        reports = []
        for outgoing in [o for o in self.outgoing.values() if o.stage is Stage.HANDED and now]:
            reports.append(self._close(outgoing, now))
            self.scheduler.attach(outgoing.request)
        return reports


class LocalUnfreeze(World):
    llumlet_class = UnfreezesItself


class FreesByTime(Llumlet):
    """A reservation that waits too long is given up."""

    def tick(self, now: float) -> list[Deed]:
        for incoming in [i for i in self.incoming.values() if i.request is None and now]:
            self._free(incoming.peer, incoming.reserve.move)
        return super().tick(now)


class ReservationTimeout(World):
    llumlet_class = FreesByTime

    def actions(self) -> Iterator[Action]:
        yield from super().actions()
        yield from (("patience", e.index) for e in self.engines if e.llumlet.incoming)


class AbortsAtOnce(Llumlet):
    """It does not wait for its copies to end before it lets the destination free the blocks."""

    def _abort(self, outgoing: Outgoing, now: float, ended: MigrationResult = MigrationResult.FINISHED) -> list[Deed]:
        return self._end(outgoing, now)


class AbortBeforeDrain(World):
    llumlet_class = AbortsAtOnce


class KeepsForTheDead(Llumlet):
    """What a dead source had reserved stays reserved."""

    def peer_died(self, peer: EngineIncarnation, now: float) -> list[Deed]:
        kept = {k: i for k, i in self.incoming.items() if i.request is None}
        self.incoming = {k: i for k, i in self.incoming.items() if k not in kept}
        actions = super().peer_died(peer, now)
        self.incoming |= kept
        return actions


class LeakedReservation(World):
    llumlet_class = KeepsForTheDead


class EndsWithItsCopy(Llumlet):
    """A copy that fails ends its move, even when the request is frozen and has asked already."""

    def copy_failed(self, move: int, now: float) -> list[Deed]:
        outgoing = self.outgoing.get(move)
        if outgoing is None or outgoing.stage is Stage.TAIL:
            return super().copy_failed(move, now)
        return self._end(outgoing, now)


class LostFrozen(World):
    llumlet_class = EndsWithItsCopy


class NamesEarly(Llumlet):
    """Reserved blocks are findable before anything is in them."""

    def _open(self, peer: EngineIncarnation, reserve: Reserve) -> Reserved | str:
        answer = super()._open(peer, reserve)
        if isinstance(answer, Reserved):
            table = self.incoming[peer, reserve.move].table
            self.scheduler.blocks.register(table[: len(reserve.hashes)], reserve.hashes)
        return answer


class EarlyHashes(World):
    llumlet_class = NamesEarly


class OverlooksPreemption(Llumlet):
    """A request that runs again after a preemption passes for one that never stopped."""

    def _intact(self, outgoing: Outgoing) -> bool:
        return self.scheduler.get(outgoing.request.rid) is outgoing.request


class UnseenPreemption(World):
    llumlet_class = OverlooksPreemption


class ObeysAnyStart(Llumlet):
    """The last Start read counts, whatever its epoch."""

    def on_start(self, request: Request, now: float) -> list[Deed]:
        actions = self.on_release(request.rid, 1 << 32, now)
        self.scheduler.add(request)
        return actions


class AnySlot(Journals):
    """A slot is taken for what the message says it is."""

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        entry = self.entries[slot]
        request = super().load(frontend, slot, rid, entry.ownership.epoch)
        if request is not None:
            request.epoch = epoch
        return request


class StaleStart(World):
    llumlet_class = ObeysAnyStart

    def make_journals(self) -> Journals:
        return AnySlot(self.entries)


class DeathBeforeDrain(World):
    def may_notice(self, observer: int, dead: EngineIncarnation) -> bool:
        return True


class NoStatement(World):
    def state_ownership(self) -> None:
        pass


def _without_output(*args: Any) -> ownership.Decision:
    held, *_ = args
    decision = ownership.takeover(*args)
    return decision._replace(output=None, ownership=decision.ownership._replace(accepted=held.accepted))


class NoCarry(World):
    verdicts = verdicts(takeover=_without_output)


def _whatever_epoch(held: Any, sender: Any, claim: Any) -> ownership.Decision:
    return ownership.takeover(held._replace(epoch=claim.epoch), sender, claim)


class StaleGrant(World):
    """A claim at an old epoch is granted."""

    verdicts = verdicts(takeover=_whatever_epoch)


def _without_release(*args: Any) -> ownership.Decision:
    decision = ownership.takeover(*args)
    orders = tuple(o for o in decision.orders if not isinstance(o.message, Release))
    return decision._replace(orders=orders)


class SilentTakeover(World):
    """The loser is not told."""

    verdicts = verdicts(takeover=_without_release)


def _award_alone(judge: Any) -> Any:
    def judged(*args: Any) -> ownership.Decision:
        decision = judge(*args)
        return decision._replace(orders=tuple(o for o in decision.orders if not isinstance(o.message, Reprioritise)))

    return judged


class LostPriority(World):
    """The winner of an award is not told the priority, which may have changed since it read the journal."""

    verdicts = verdicts(takeover=_award_alone(ownership.takeover))


class ThawsOnly(Llumlet):
    """Only what runs or waits takes another priority."""

    def on_reprioritise(self, rid: int, epoch: int, priority: int) -> None:
        request = self.scheduler.get(rid)
        if request is not None and request.epoch == epoch:
            self.scheduler.reprioritise(request, priority)


class FrozenPriority(World):
    llumlet_class = ThawsOnly


def _at_once(held: ownership.Ownership, owner: EngineIncarnation) -> ownership.Ownership:
    return held._replace(epoch=max(1, held.epoch), owner=owner)


class SameEpoch(World):
    """A request is started anew at the epoch that its former owner may still have."""

    verdicts = verdicts(started=_at_once)
