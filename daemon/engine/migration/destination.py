"""The incoming moves of one engine: the destination's side of a migration. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from daemon.engine.migration.actions import Action, Journals, Send, Tell
from daemon.engine.request import Request
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import Declined, EngineIncarnation, Handover, Reserve, Reserved, Takeover

MAX_INCOMING = 8  # concurrent moves


@dataclass(slots=True, eq=False)
class Incoming:
    """One move to this engine: a reservation, and after the Handover the pending request."""

    peer: EngineIncarnation
    reserve: Reserve
    table: list[int]  # reserved blocks
    request: Request | None = None  # set once it is pending: it waits for the frontend's Grant
    claim: Takeover | None = None  # of the pending request


class Destination:
    """The incoming moves of one engine."""

    def __init__(self, scheduler: Scheduler, journals: Journals, *, max_incoming: int = MAX_INCOMING) -> None:
        self.accepting = True  # False: decline every new move
        self.incoming: dict[tuple[EngineIncarnation, int], Incoming] = {}  # by source and the source's move number
        self._scheduler = scheduler
        self._journals = journals
        self._max_incoming = max_incoming

    @property
    def pending(self) -> list[Request]:
        """Requests that were handed over to this engine and wait for their Grant."""
        return [i.request for i in self.incoming.values() if i.request is not None]

    def on_reserve(self, peer: EngineIncarnation, reserve: Reserve) -> list[Action]:
        """Reserve room for a new move, or more room for a known one; answer with Reserved or Declined."""
        known = self.incoming.get((peer, reserve.move))
        answer = self._extend(known, reserve) if known else self._open(peer, reserve)
        if isinstance(answer, str):
            return [Send(peer, Declined(reserve.move, reserve.rid, reserve.epoch, reason=answer))]
        return [Send(peer, answer)]

    def _open(self, peer: EngineIncarnation, reserve: Reserve) -> Reserved | str:
        """Reserve a place in the batch and the blocks for a new move. Blocks found in the prefix cache are held
        from now on. Return the answer, or the reason to decline."""
        blocks = self._scheduler.blocks
        if reason := self._refusal(reserve):
            return reason
        matched = blocks.match(reserve.hashes) if blocks.prefix_caching else []
        fresh = blocks.blocks_for(reserve.num_tokens) - len(matched)
        if not self._has_room(fresh + blocks.num_idle(matched)):
            return "too few free KV blocks"
        if not self._scheduler.reserve():
            return "the batch is full"
        blocks.acquire(matched)
        granted = self._scheduler.allocate_settled(fresh)
        self.incoming[peer, reserve.move] = Incoming(peer, reserve, matched + granted)
        return _reserved(reserve, len(matched), granted)

    def _refusal(self, reserve: Reserve) -> str:
        """Return why the engine takes no such move, whatever room it has; "" if it does."""
        if not self.accepting or reserve.reservation:
            return "the engine accepts no moves"
        if reserve.fingerprint != self._scheduler.blocks.fingerprint:
            return "the engine has other weights, or KV of another form"
        if reserve.longest > self._scheduler.max_len:
            return f"the request can reach {reserve.longest} tokens, which do not fit here"
        if len(self.incoming) >= self._max_incoming:
            return f"{len(self.incoming)} requests are already being moved here"
        return ""

    def _extend(self, incoming: Incoming, reserve: Reserve) -> Reserved | str:
        """Reserve more blocks for a known move. Return the answer, or the reason to decline."""
        blocks = self._scheduler.blocks
        fresh = max(0, blocks.blocks_for(reserve.num_tokens) - len(incoming.table))
        if not self._has_room(fresh):
            return "too few free KV blocks"
        granted = self._scheduler.allocate_settled(fresh)
        incoming.table += granted
        return _reserved(reserve, 0, granted)

    def _has_room(self, num_blocks: int) -> bool:
        """Return True if after taking `num_blocks` one block is left for each running request, and 1 % of the pool
        stays free."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        kept = len(scheduler.running) + blocks.capacity // 100 + scheduler.num_unsettled
        return blocks.can_allocate(num_blocks + kept)

    def on_handover(self, peer: EngineIncarnation, handover: Handover) -> list[Action]:
        """Hold the request as pending and ask the frontend for it: all its KV is here. Decline a request that does
        not fit its journal."""
        incoming = self.incoming.get((peer, handover.move))
        request = self._rebuild(incoming, handover) if incoming else None
        if incoming is None or request is None:
            self.free(peer, handover.move)
            reason = "the journal no longer holds the request at this epoch"
            return [Send(peer, Declined(handover.move, handover.rid, handover.epoch, reason))]
        incoming.request = request
        incoming.claim = Takeover(request.rid, request.epoch, handover.start, handover.tokens, handover.logprobs)
        return [Tell(request.frontend, incoming.claim)]

    def _rebuild(self, incoming: Incoming, handover: Handover) -> Request | None:
        """Build the request from its journal, the output in the Handover, and the copied KV."""
        reserve = incoming.reserve
        try:
            request = self._journals.load(reserve.frontend, reserve.slot, reserve.rid, reserve.epoch)
        except ValueError:  # unreadable: one request must not end this engine; its source keeps it
            return None
        if request is None or request.num_output < handover.start:
            return None
        request.tokens[request.prompt_len + handover.start :] = handover.tokens
        request.slot = reserve.slot
        request.num_computed = handover.num_computed
        request.num_cached = handover.num_cached
        request.hashes = list(reserve.hashes)
        request.block_table = incoming.table
        return request

    def take_granted(self, rid: int, epoch: int) -> Request | None:
        """End the move of the request that is pending at exactly this epoch, and return the request."""
        for key, incoming in self.incoming.items():
            request = incoming.request
            if request is not None and request.rid == rid and request.epoch == epoch:
                del self.incoming[key]
                return request
        return None

    def claim_again(self, concerns: Callable[[Request], bool]) -> list[Action]:
        """Repeat the claims of the pending requests that match: the frontend may have died with its answer.

        Every claim gets an answer, so a request that has ended or belongs to another engine is freed by it.
        """
        pending = [(i.request, i.claim) for i in self.incoming.values()]
        return [Tell(r.frontend, claim) for r, claim in pending if r and claim and concerns(r)]

    def drop_pending(self, should_drop: Callable[[Request], bool]) -> None:
        """Free the pending requests that match."""
        for incoming in [i for i in self.incoming.values() if i.request is not None and should_drop(i.request)]:
            self.free(incoming.peer, incoming.reserve.move)

    def on_peer_death(self, is_dead: Callable[[EngineIncarnation], bool]) -> None:
        """Free the reservations of dead engines. Requests that are already pending stay pending."""
        for incoming in [i for i in self.incoming.values() if is_dead(i.peer) and i.request is None]:
            self.free(incoming.peer, incoming.reserve.move)

    def free(self, peer: EngineIncarnation, move: int) -> None:
        """Free a reservation or a pending request. Call it only when the source no longer writes to the blocks."""
        incoming = self.incoming.pop((peer, move), None)
        if incoming is not None:
            self._scheduler.blocks.free(incoming.table)
            self._scheduler.unreserve()


def _reserved(reserve: Reserve, skip: int, blocks: list[int]) -> Reserved:
    return Reserved(
        move=reserve.move,
        rid=reserve.rid,
        epoch=reserve.epoch,
        reservation=reserve.reservation,
        skip=skip,
        blocks=blocks,
    )
