"""Who may run a request: the frontend's verdicts about one request. Pure.

The frontend alone raises the epoch of a request and names its owner. Whatever arrives at another epoch than the
present one, or for a request that has ended, is stale: its sender is told to let go. Each function takes the
`Ownership` of a request and an event, and returns a `Decision`; nothing is changed. The caller journals the
verdict's output, then its custody with one store, then sends its orders: whatever is lost by dying in between is
made good by the statement of the next frontend.

A change of priority reaches the owner as `Reprioritise` at the epoch at which the owner holds the request. Epochs
rise by messages on that same lane alone (Start, Grant), so when it is read the engine holds the request at exactly
that epoch or not at all: never at a newer one; what it may still hold at an older one is never granted. A Start reads
the priority in the journal. The winner of an award has read it at the epoch before, perhaps ahead of a change: then
it is told after its Grant.

An engine's death is an event only after all that the engine had written has been judged.
"""

from __future__ import annotations

from typing import NamedTuple

from daemon.ipc.messages import (
    Cancel,
    EngineIncarnation,
    Grant,
    HandBack,
    Reclaim,
    Release,
    Reprioritise,
    Takeover,
    TokenLogprobs,
)


class Ownership(NamedTuple):
    """What the frontend knows of an unfinished request."""

    rid: int
    epoch: int
    owner: EngineIncarnation | None  # None: no engine has it at this epoch, it is to be started
    accepted: int  # output tokens journaled
    priority: int = 0  # as it is now
    changed: bool = False  # its priority, since this epoch began


class Order(NamedTuple):
    """A message to that life of an engine; void if it is over."""

    to: EngineIncarnation
    message: Grant | Release | Cancel | Reprioritise


class Output(NamedTuple):
    """Output to accept, after all that is accepted already."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Decision(NamedTuple):
    """What follows from an event, in this order: journal `output`, store `ownership`, send `orders`.

    `redispatch`: nobody runs it now: pick an engine, store `started`, send Start. `fault`: output was lost.
    """

    ownership: Ownership
    output: Output | None = None
    orders: tuple[Order, ...] = ()
    redispatch: bool = False
    fault: bool = False


def fresh(accepted: int, start: int, count: int) -> int | None:
    """How many of `count` tokens from output position `start` on are known already; None if some are missing
    in between."""
    return None if start > accepted else min(accepted - start, count)


def stale(rid: int, epoch: int, sender: EngineIncarnation) -> Order:
    """The answer to a claim on a request that has ended, or was never known."""
    return Order(sender, Release(rid, epoch))


def takeover(ownership: Ownership, sender: EngineIncarnation, claim: Takeover) -> Decision:
    """The destination of a migration claims the request. The first claim at an epoch wins."""
    if claim.epoch != ownership.epoch:
        return Decision(ownership, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(ownership, sender, claim)


def reclaim(ownership: Ownership, sender: EngineIncarnation, claim: Reclaim) -> Decision:
    """The source of a migration claims the request that it froze."""
    if claim.epoch != ownership.epoch or sender != ownership.owner:
        return Decision(ownership, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(ownership, sender, claim)


def hand_back(ownership: Ownership, sender: EngineIncarnation, message: HandBack) -> Decision:
    """The owner does not run it any more and holds nothing of it."""
    if message.epoch != ownership.epoch or sender != ownership.owner:
        return Decision(ownership)
    return _orphan(ownership)


def engine_died(ownership: Ownership, dead: EngineIncarnation) -> Decision:
    """Call it after the dead engine's ring is read to its end."""
    return _orphan(ownership) if ownership.owner == dead else Decision(ownership)


def disown(ownership: Ownership) -> Decision:
    """The owner is suspected, or output of it was lost: take the request away from it."""
    decision = _orphan(ownership)
    return decision if ownership.owner is None else decision._replace(orders=(_release(ownership, ownership.owner),))


def started(ownership: Ownership, owner: EngineIncarnation) -> Ownership:
    """Custody with the request given anew to `owner`, which is to be sent a Start at that epoch."""
    return ownership._replace(epoch=ownership.epoch + 1, owner=owner, changed=False)


def cancel(ownership: Ownership) -> tuple[Order, ...]:
    """What to send when the request ends before its engine says so."""
    if ownership.owner is None:
        return ()
    return (Order(ownership.owner, Cancel(ownership.rid, ownership.epoch)),)


def reprioritise(ownership: Ownership, priority: int) -> Decision:
    """The request has another priority from now on."""
    changed = ownership._replace(priority=priority, changed=True)
    return Decision(changed, orders=(_priority(changed, ownership.owner),) if ownership.owner else ())


def _award(ownership: Ownership, winner: EngineIncarnation, claim: Takeover | Reclaim) -> Decision:
    """The claimant owns the request from now on, with the output it carries."""
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
