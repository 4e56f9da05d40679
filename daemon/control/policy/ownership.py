"""Ownership: the frontend's decisions about which engine may run a request. Pure.

The frontend alone raises the epoch of a request and sets its owner. A message at another epoch than the present
one, or for a request that has ended, is stale: its sender gets a `Release`. Each function takes the `Ownership` of
a request and an event, and returns a `Decision`; nothing is changed. The caller journals the output of the
decision, then stores the ownership with one store, then sends the orders. A crash between these steps is repaired
by the `OwnedRequests` of the next frontend.

A change of priority is sent to the owner as `Reprioritise` at the epoch at which the owner holds the request.
Epochs rise by messages on that same ring alone (Start, Grant). So when the engine reads the message, it holds the
request at exactly that epoch or not at all: never at a newer one, and what it may still hold at an older one is
never granted. An engine reads the priority from the journal when it gets a Start. The winner of an award has read
the journal at the epoch before, perhaps before the change: therefore it gets a `Reprioritise` after its Grant.

The death of an engine is an event only after all messages that the engine had written have been handled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from daemon.ipc.messages import (
    Cancel,
    EngineIncarnation,
    Grant,
    HandBack,
    OwnedRequests,
    Reclaim,
    Release,
    Reprioritise,
    Takeover,
    TokenLogprobs,
)

_MAX_OWNED = 2000  # requests in one `OwnedRequests`: far below the size of a ring
_LAST_RID = (1 << 64) - 1


class Ownership(NamedTuple):
    """What the frontend knows about an unfinished request."""

    rid: int
    epoch: int
    owner: EngineIncarnation | None  # None: no engine has it at this epoch; it must be started
    accepted: int  # output tokens journaled
    priority: int = 0
    changed: bool = False  # the priority has changed since this epoch began


class Order(NamedTuple):
    """A message to an engine incarnation; void if that incarnation is dead."""

    to: EngineIncarnation
    message: Grant | Release | Cancel | Reprioritise


class Output(NamedTuple):
    """Output to append to the accepted output."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Decision(NamedTuple):
    """What the caller must do after an event, in this order: journal `output`, store `ownership`, send `orders`.

    `redispatch`: no engine runs the request now: choose one, store `started`, send Start. `fault`: output was lost.
    """

    ownership: Ownership
    output: Output | None = None
    orders: tuple[Order, ...] = ()
    redispatch: bool = False
    fault: bool = False


def fresh(accepted: int, start: int, count: int) -> int | None:
    """Return how many of `count` tokens from output position `start` on are accepted already.

    None if tokens between the accepted ones and `start` are missing.
    """
    return None if start > accepted else min(accepted - start, count)


def stale(rid: int, epoch: int, sender: EngineIncarnation) -> Order:
    """Return the answer to a claim on a request that has ended, or that the frontend does not know."""
    return Order(sender, Release(rid, epoch))


def takeover(ownership: Ownership, sender: EngineIncarnation, claim: Takeover) -> Decision:
    """Decide on the claim of a migration's destination. The first claim at an epoch wins."""
    if claim.epoch != ownership.epoch:
        return Decision(ownership, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(ownership, sender, claim)


def reclaim(ownership: Ownership, sender: EngineIncarnation, claim: Reclaim) -> Decision:
    """Decide on the claim of a migration's source for the request that it froze."""
    if claim.epoch != ownership.epoch or sender != ownership.owner:
        return Decision(ownership, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(ownership, sender, claim)


def hand_back(ownership: Ownership, sender: EngineIncarnation, message: HandBack) -> Decision:
    """Handle that the owner no longer runs the request and holds nothing of it."""
    if message.epoch != ownership.epoch or sender != ownership.owner:
        return Decision(ownership)
    return _orphan(ownership)


def engine_died(ownership: Ownership, dead: EngineIncarnation) -> Decision:
    """Handle the death of an engine. Call this after the dead engine's ring has been read to its end."""
    return _orphan(ownership) if ownership.owner == dead else Decision(ownership)


def disown(ownership: Ownership) -> Decision:
    """Take the request away from its owner, which is suspected dead or whose output was lost."""
    decision = _orphan(ownership)
    return decision if ownership.owner is None else decision._replace(orders=(_release(ownership, ownership.owner),))


def started(ownership: Ownership, owner: EngineIncarnation) -> Ownership:
    """Return the ownership at the next epoch, with `owner`. The caller sends `owner` a Start at that epoch."""
    return ownership._replace(epoch=ownership.epoch + 1, owner=owner, changed=False)


def cancel(ownership: Ownership) -> tuple[Order, ...]:
    """Return the orders to send when the request ends before its engine reports the end."""
    if ownership.owner is None:
        return ()
    return (Order(ownership.owner, Cancel(ownership.rid, ownership.epoch)),)


def reprioritise(ownership: Ownership, priority: int) -> Decision:
    """Set the priority of the request."""
    changed = ownership._replace(priority=priority, changed=True)
    return Decision(changed, orders=(_priority(changed, ownership.owner),) if ownership.owner else ())


def owned_requests(owned: Iterable[Ownership]) -> list[OwnedRequests]:
    """Return the messages that state to an engine all that it owns; each speaks of a range of ids."""
    ordered = sorted(owned)
    parts = [ordered[i : i + _MAX_OWNED] for i in range(0, len(ordered), _MAX_OWNED)] or [[]]
    begins = [0, *(part[0].rid for part in parts[1:]), _LAST_RID + 1]
    return [
        OwnedRequests(
            rids=[o.rid for o in part],
            epochs=[o.epoch for o in part],
            accepted=[o.accepted for o in part],
            priorities=[o.priority for o in part],
            first=begins[i],
            last=begins[i + 1] - 1,
        )
        for i, part in enumerate(parts)
    ]


def _award(ownership: Ownership, winner: EngineIncarnation, claim: Takeover | Reclaim) -> Decision:
    """Make the claimant the owner, and accept the output that its claim carries."""
    known = fresh(ownership.accepted, claim.start, len(claim.tokens))
    if known is None or claim.start + len(claim.tokens) < ownership.accepted:
        decision = disown(ownership)
        return decision._replace(orders=(*decision.orders, _release(ownership, winner)), fault=True)
    tokens = claim.tokens[known:]
    logprobs = None if claim.logprobs is None else claim.logprobs[known:]
    awarded = started(ownership, winner)._replace(accepted=ownership.accepted + len(tokens))
    orders = [Order(winner, Grant(ownership.rid, ownership.epoch, awarded.epoch))]
    if ownership.changed:
        orders.append(_priority(awarded, winner))
    if ownership.owner not in (None, winner):
        orders.append(_release(ownership, ownership.owner))
    return Decision(awarded, Output(tokens, logprobs) if tokens else None, tuple(orders))


def _orphan(ownership: Ownership) -> Decision:
    return Decision(ownership._replace(owner=None), redispatch=True)


def _priority(ownership: Ownership, owner: EngineIncarnation) -> Order:
    return Order(owner, Reprioritise(ownership.rid, ownership.epoch, ownership.priority))


def _release(ownership: Ownership, holder: EngineIncarnation) -> Order:
    return Order(holder, Release(ownership.rid, ownership.epoch))
