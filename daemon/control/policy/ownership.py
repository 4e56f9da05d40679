"""Who may run a request: the frontend's verdicts about one request. Pure.

The frontend alone raises the epoch of a request and names its owner. Whatever arrives at another epoch than the
present one, or for a request that has ended, is stale: its sender is told to let go. Each function takes the
`Custody` of a request and an event, and returns a `Verdict`; nothing is changed. The caller journals the
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

from daemon.ipc.messages import AskBack, Cancel, Grant, HandBack, Release, Reprioritise, Takeover, TokenLogprobs


class Owner(NamedTuple):
    """One life of one engine."""

    engine: int
    incarnation: int


class Custody(NamedTuple):
    """What the frontend knows of an unfinished request."""

    rid: int
    epoch: int
    owner: Owner | None  # None: no engine has it at this epoch, it is to be started
    accepted: int  # output tokens journaled
    priority: int = 0  # as it is now
    changed: bool = False  # its priority, since this epoch began


class Order(NamedTuple):
    """A message to that life of an engine; void if it is over."""

    to: Owner
    message: Grant | Release | Cancel | Reprioritise


class Output(NamedTuple):
    """Output to accept, after all that is accepted already."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Verdict(NamedTuple):
    """What follows from an event, in this order: journal `output`, store `custody`, send `orders`.

    `redispatch`: nobody runs it now: pick an engine, store `started`, send Start. `fault`: output was lost.
    """

    custody: Custody
    output: Output | None = None
    orders: tuple[Order, ...] = ()
    redispatch: bool = False
    fault: bool = False


def fresh(accepted: int, start: int, count: int) -> int | None:
    """How many of `count` tokens from output position `start` on are known already; None if some are missing
    in between."""
    return None if start > accepted else min(accepted - start, count)


def stale(rid: int, epoch: int, sender: Owner) -> Order:
    """The answer to a claim on a request that has ended, or was never known."""
    return Order(sender, Release(rid, epoch))


def takeover(custody: Custody, sender: Owner, claim: Takeover) -> Verdict:
    """The destination of a migration claims the request. The first claim at an epoch wins."""
    if claim.epoch != custody.epoch:
        return Verdict(custody, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(custody, sender, claim)


def ask_back(custody: Custody, sender: Owner, claim: AskBack) -> Verdict:
    """The source of a migration claims the request that it froze."""
    if claim.epoch != custody.epoch or sender != custody.owner:
        return Verdict(custody, orders=(stale(claim.rid, claim.epoch, sender),))
    return _award(custody, sender, claim)


def hand_back(custody: Custody, sender: Owner, message: HandBack) -> Verdict:
    """The owner does not run it any more and holds nothing of it."""
    if message.epoch != custody.epoch or sender != custody.owner:
        return Verdict(custody)
    return _orphan(custody)


def engine_died(custody: Custody, dead: Owner) -> Verdict:
    """Call it after the dead engine's ring is read to its end."""
    return _orphan(custody) if custody.owner == dead else Verdict(custody)


def disown(custody: Custody) -> Verdict:
    """The owner is suspected, or output of it was lost: take the request away from it."""
    verdict = _orphan(custody)
    return verdict if custody.owner is None else verdict._replace(orders=(_release(custody, custody.owner),))


def started(custody: Custody, owner: Owner) -> Custody:
    """Custody with the request given anew to `owner`, which is to be sent a Start at that epoch."""
    return custody._replace(epoch=custody.epoch + 1, owner=owner, changed=False)


def cancel(custody: Custody) -> tuple[Order, ...]:
    """What to send when the request ends before its engine says so."""
    if custody.owner is None:
        return ()
    return (Order(custody.owner, Cancel(custody.rid, custody.epoch)),)


def reprioritise(custody: Custody, priority: int) -> Verdict:
    """The request has another priority from now on."""
    changed = custody._replace(priority=priority, changed=True)
    return Verdict(changed, orders=(_priority(changed, custody.owner),) if custody.owner else ())


def _award(custody: Custody, winner: Owner, claim: Takeover | AskBack) -> Verdict:
    """The claimant owns the request from now on, with the output it carries."""
    known = fresh(custody.accepted, claim.start, len(claim.tokens))
    if known is None or claim.start + len(claim.tokens) < custody.accepted:
        verdict = disown(custody)
        return verdict._replace(orders=(*verdict.orders, _release(custody, winner)), fault=True)
    tokens = claim.tokens[known:]
    logprobs = None if claim.logprobs is None else claim.logprobs[known:]
    awarded = started(custody, winner)._replace(accepted=custody.accepted + len(tokens))
    orders = [Order(winner, Grant(custody.rid, custody.epoch, awarded.epoch))]
    if custody.changed:
        orders.append(_priority(awarded, winner))
    if custody.owner not in (None, winner):
        orders.append(_release(custody, custody.owner))
    return Verdict(awarded, Output(tokens, logprobs) if tokens else None, tuple(orders))


def _orphan(custody: Custody) -> Verdict:
    return Verdict(custody._replace(owner=None), redispatch=True)


def _priority(custody: Custody, owner: Owner) -> Order:
    return Order(owner, Reprioritise(custody.rid, custody.epoch, custody.priority))


def _release(custody: Custody, holder: Owner) -> Order:
    return Order(holder, Release(custody.rid, custody.epoch))
