"""Worlds with one rule of the protocol broken. The explorer must find a flaw in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec

from daemon.control.policy import ownership
from daemon.engine.migration.actions import Action as LlumletAction
from daemon.engine.migration.destination import Destination
from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.migration.source import Outgoing, Phase, Source
from daemon.engine.request import Request
from daemon.enums import MigrationResult
from daemon.ipc.messages import EngineIncarnation, OwnedRequests, Release, Reprioritise, Reserve, Reserved
from tests.protocol.engine_model import FRONTEND, Engine, Entry, Journals
from tests.protocol.world import Action, World


def broken_rules(**broken: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(ownership) | broken))


class UnfreezesAfterTimeout(Llumlet):
    """After the timeout it runs the frozen request again without a Reclaim."""

    def tick(self, now: float) -> list[LlumletAction]:
        reports = []
        for outgoing in [o for o in self.outgoing.values() if o.phase is Phase.HANDED_OVER and now]:
            reports.append(self.source.close(outgoing, now))
            self.scheduler.attach(outgoing.request)
        return reports


class LocalUnfreeze(World):
    """A source runs a frozen request again without asking the frontend."""

    llumlet_class = UnfreezesAfterTimeout


class FreesReservationsAfterTimeout(Llumlet):
    """It frees a reservation after a timeout."""

    def tick(self, now: float) -> list[LlumletAction]:
        for incoming in [i for i in self.incoming.values() if i.request is None and now]:
            self.destination.free(incoming.peer, incoming.reserve.move)
        return super().tick(now)


class ReservationTimeout(World):
    """A destination frees blocks that a source may still write."""

    llumlet_class = FreesReservationsAfterTimeout

    def actions(self) -> Iterator[Action]:
        yield from super().actions()
        yield from (("time_out", e.index) for e in self.engines if e.llumlet.incoming)


class AbortsAtOnce(Source):
    """It sends Aborted, which lets the destination free the blocks, before its copies have ended."""

    def _abort(
        self, outgoing: Outgoing, now: float, result: MigrationResult = MigrationResult.FINISHED
    ) -> list[LlumletAction]:
        return self.end(outgoing, now)


class AbortBeforeDrain(World):
    """A source aborts a move before its copies have ended."""

    source_class = AbortsAtOnce


class KeepsReservationsOfDeadPeers(Destination):
    """It keeps the reservations of a dead source."""

    def on_peer_death(self, is_dead: Callable[[EngineIncarnation], bool]) -> None:
        pass


class LeakedReservation(World):
    """Reservations of a dead source are never freed."""

    destination_class = KeepsReservationsOfDeadPeers


class EndsMoveWithFailedCopy(Llumlet):
    """A failed copy ends its move, even if the request is frozen and handed over already."""

    def copy_failed(self, move: int, now: float) -> list[LlumletAction]:
        outgoing = self.outgoing.get(move)
        if outgoing is None or outgoing.phase is Phase.COPYING_TAIL:
            return super().copy_failed(move, now)
        return self.source.end(outgoing, now)


class LostFrozen(World):
    """A frozen request is lost when a copy fails."""

    llumlet_class = EndsMoveWithFailedCopy


class RegistersHashesEarly(Destination):
    """It registers the hashes of reserved blocks before their KV is there."""

    def _open(self, peer: EngineIncarnation, reserve: Reserve) -> Reserved | str:
        answer = super()._open(peer, reserve)
        if isinstance(answer, Reserved):
            table = self.incoming[peer, reserve.move].table
            self._scheduler.blocks.register(table[: len(reserve.hashes)], reserve.hashes)
        return answer


class EarlyHashes(World):
    """Another request finds reserved blocks before their KV is there."""

    destination_class = RegistersHashesEarly


class OverlooksPreemption(Source):
    """It does not notice that a request was preempted and runs again."""

    def is_intact(self, outgoing: Outgoing) -> bool:
        return self._scheduler.get(outgoing.request.rid) is outgoing.request


class UnseenPreemption(World):
    """KV of a preempted request is moved."""

    source_class = OverlooksPreemption


class AcceptsAnyStart(Llumlet):
    """It accepts every Start, whatever its epoch."""

    def on_start(self, request: Request, now: float) -> list[LlumletAction]:
        actions = self.on_release(request.rid, 1 << 32, now)
        self.scheduler.add(request)
        return actions


class IgnoresEpochOfSlot(Journals):
    """It loads a slot at the epoch of the message, whatever the epoch of the slot."""

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        entry = self.entries[slot]
        request = super().load(frontend, slot, rid, entry.ownership.epoch)
        if request is not None:
            request.epoch = epoch
        return request


class StaleStart(World):
    """A stale Start is accepted."""

    llumlet_class = AcceptsAnyStart

    def make_journals(self) -> Journals:
        return IgnoresEpochOfSlot(self.entries)


class DeathBeforeDrain(World):
    """A death is handled before all messages of the dead engine have been read."""

    def may_notice(self, observer: int, dead: EngineIncarnation) -> bool:
        return True


class NoOwnedRequests(World):
    """A new frontend does not send the engines what they own."""

    def send_owned_requests(self, engine: Engine) -> None:
        pass


class DropsWhatIsNotOwned(Llumlet):
    """It also drops the pending requests that the statement of ownership omits."""

    def on_owned_requests(self, frontend: int, message: OwnedRequests, now: float) -> list[LlumletAction]:
        self.destination.drop_pending(lambda request: request.rid not in message.rids)
        return super().on_owned_requests(frontend, message, now)


class DroppedClaim(World):
    """A claim that is on its way to the successor is dropped at its engine, and then granted."""

    llumlet_class = DropsWhatIsNotOwned


class UnreadRings(World):
    """A successor does not read what was addressed to its predecessor."""

    def succeed(self, *how: Any) -> None:
        super().succeed(*how)
        for (_, reader), ring in self.rings.items():
            if reader == FRONTEND:
                ring.clear()


class DoubledOutput(World):
    """A successor takes output that it reads again for new."""

    rules = broken_rules(fresh=lambda accepted, start, count: None if start > accepted else 0)


def _without_priorities(owned: Iterable[ownership.Ownership]) -> list[OwnedRequests]:
    return ownership.owned_requests(o._replace(priority=0) for o in owned)


class UntoldPriority(World):
    """A successor does not repeat a change of priority that its predecessor has journaled and not sent."""

    rules = broken_rules(owned_requests=_without_priorities)


def _without_output(*args: Any) -> ownership.Decision:
    held, *_ = args
    decision = ownership.takeover(*args)
    return decision._replace(output=None, ownership=decision.ownership._replace(accepted=held.accepted))


class NoCarriedOutput(World):
    """The output that a claim carries is dropped."""

    rules = broken_rules(takeover=_without_output)


def _any_epoch(held: Any, sender: Any, claim: Any) -> ownership.Decision:
    return ownership.takeover(held._replace(epoch=claim.epoch), sender, claim)


class StaleGrant(World):
    """A claim at an old epoch is granted."""

    rules = broken_rules(takeover=_any_epoch)


def _without_release(*args: Any) -> ownership.Decision:
    decision = ownership.takeover(*args)
    orders = tuple(o for o in decision.orders if not isinstance(o.message, Release))
    return decision._replace(orders=orders)


class SilentTakeover(World):
    """The engine that loses the request is not sent a Release."""

    rules = broken_rules(takeover=_without_release)


def _without_priority(rule: Any) -> Any:
    def decide(*args: Any) -> ownership.Decision:
        decision = rule(*args)
        return decision._replace(orders=tuple(o for o in decision.orders if not isinstance(o.message, Reprioritise)))

    return decide


class LostPriority(World):
    """The winner of an award is not sent the priority, which may have changed since it read the journal."""

    rules = broken_rules(takeover=_without_priority(ownership.takeover))


class ReprioritisesScheduledOnly(Llumlet):
    """Only running and waiting requests get a new priority, frozen ones do not."""

    def on_reprioritise(self, rid: int, epoch: int, priority: int) -> None:
        request = self.scheduler.get(rid)
        if request is not None and request.epoch == epoch:
            self.scheduler.reprioritise(request, priority)


class FrozenPriority(World):
    llumlet_class = ReprioritisesScheduledOnly


def _at_same_epoch(held: ownership.Ownership, owner: EngineIncarnation) -> ownership.Ownership:
    return held._replace(epoch=max(1, held.epoch), owner=owner)


class SameEpoch(World):
    """A request is started again at the epoch at which its former owner may still run it."""

    rules = broken_rules(started=_at_same_epoch)


class LosesSalts(Journals):
    def salt_of(self, entry: Entry) -> bytes:
        return b""


class LostSalt(World):
    """Engines hash the blocks of all tenants alike."""

    def make_journals(self) -> Journals:
        return LosesSalts(self.entries)


class IgnoresFingerprints(Destination):
    """It takes KV of other weights."""

    def on_reserve(self, peer: EngineIncarnation, reserve: Reserve) -> list[LlumletAction]:
        mine = self._scheduler.blocks.fingerprint
        return super().on_reserve(peer, msgspec.structs.replace(reserve, fingerprint=mine))


class ForeignKv(World):
    """KV moves between engines with different weights."""

    destination_class = IgnoresFingerprints


class ForeignWeights(World):
    """A request goes on at any engine, whatever its weights."""

    def may_continue(self, entry: Entry, index: int) -> bool:
        return True
