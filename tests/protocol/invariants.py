"""The invariants of the protocol: what must hold in every state of a `World`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemon.control.policy.ownership import Ownership
from daemon.engine.migration.actions import Copy
from tests.protocol.engine_model import FRONTEND, Engine, Entry, Violation

if TYPE_CHECKING:
    from tests.protocol.world import World


def check_invariants(world: World) -> None:
    """Raise Violation or PoolError if an invariant does not hold."""
    for engine in world.engines:
        engine.scheduler.check(engine.llumlet.tables())
        _check_reserved_places(engine)
        _check_reports(engine)
        for copy in engine.copies:
            _check_copy(world, engine, copy)
    for rid, entry in world.entries.items():
        _check_owner(world, rid, entry)
        _check_priority(world, entry.ownership)


def is_finished(world: World) -> bool:
    """Return True if every request has ended and no engine, ring or copy holds anything of it."""
    if any(e.open for e in world.entries.values()) or any(world.rings.values()) or world.notices:
        return False
    return not any(
        e.scheduler.running or e.scheduler.waiting or e.step_in_flight or e.copies
        or e.llumlet.outgoing or e.llumlet.incoming or e.scheduler.blocks.num_used
        or e.scheduler.num_reserved_places
        for e in world.engines
    )  # fmt: skip


def _check_reserved_places(engine: Engine) -> None:
    """Each frozen or incoming request holds exactly one place in the batch."""
    holders = len(engine.llumlet.frozen) + len(engine.llumlet.incoming)
    if engine.scheduler.num_reserved_places != holders:
        raise Violation(f"leaked: {engine.scheduler.num_reserved_places} places are reserved for {holders} requests")


def _check_reports(engine: Engine) -> None:
    """Every move is reported exactly once when it has ended."""
    ended = engine.llumlet.source.num_moves - len(engine.llumlet.outgoing)
    if engine.reports != ended:
        raise Violation(f"unreported: {ended} moves have ended, {engine.reports} were reported")


def _check_copy(world: World, engine: Engine, copy: Copy) -> None:
    """A block that a copy may still write is reserved for the copy's move."""
    destination = world.engines[copy.peer.engine]
    if destination.identity != copy.peer:
        return
    incoming = destination.llumlet.incoming.get((engine.identity, copy.move))
    for _, block in copy.pairs:
        if incoming is None or incoming.request is not None or block not in incoming.table:
            raise Violation(f"free and writable: block {block} of engine {destination.index}")


def _check_owner(world: World, rid: int, entry: Entry) -> None:
    """No two engines run a request at one epoch, and none at an epoch newer than the journaled one."""
    epochs = [r.epoch for e in world.engines if (r := e.scheduler.get(rid)) is not None]
    if len(set(epochs)) < len(epochs) or max(epochs, default=0) > entry.ownership.epoch:
        raise Violation(f"two owners: running at epochs {epochs}, journaled {entry.ownership.epoch}")


def _check_priority(world: World, ownership: Ownership) -> None:
    """Once the owner has read all messages, the request runs, waits or is frozen there at the journaled priority."""
    if ownership.owner is None or world.rings[FRONTEND, ownership.owner.engine]:
        return
    engine = world.engines[ownership.owner.engine]
    if engine.incarnation != ownership.owner.incarnation:
        return
    scheduled = engine.scheduler.get(ownership.rid)
    for request in (*engine.llumlet.frozen, *([scheduled] if scheduled else [])):
        is_owned = (request.rid, request.epoch) == (ownership.rid, ownership.epoch)
        if is_owned and request.params.priority != ownership.priority:
            raise Violation(f"priority: {request.params.priority} where {ownership.priority} is journaled")
