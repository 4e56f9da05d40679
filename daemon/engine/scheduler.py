"""Decides, step by step, which tokens of which requests are computed. Pure.

`plan` settles who is in the batch, then cuts the step's token budget into rows:

1. *grow*: each running request gets a block where its next token needs one; when none is left the least
   urgent request is preempted: its blocks are freed, its tokens kept, and it is computed anew later;
2. *admit*: from the head of the queue while batch slots, blocks and tokens last. A request of a more urgent
   class may displace those of less urgent ones. Nobody overtakes the head, so a big request is not starved;
3. *rows*: all decodes, then prefill chunks by urgency. Beside decodes chunks may be held smaller
   (`max_mixed_tokens`), for whoever decodes waits for them.

A request gets the blocks of all its known tokens when it is admitted, so a prefill once begun never waits for
memory. Urgency is ``(class, key(request, now), rid)``; the least goes first. `fold` takes in the step's result.

A step may be planned while the one before is in flight, that is planned and not folded: its decodes then compute
tokens that nobody knows yet. Steps are folded in the order of their plans. A request that turns out to have ended
gives one row in vain. Its blocks are free at once, for what the next steps write there is written later; only a
peer, whose writes nothing puts in order, must not get them before that row is done (`allocate_settled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

from msgspec.structs import replace

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, Row, StepPlan, StepResult
from daemon.engine.waiting_queue import Urgency, WaitingQueue
from daemon.ipc.messages import Finish, TokenLogprobs
from daemon.kvpool.block_manager import BlockManager, PoolError, block_hashes

Key = Callable[[Request, float], float]


def fcfs(request: Request, _now: float) -> float:
    """First come, first served. A preempted request keeps its arrival, so it comes back first."""
    return request.params.arrival


class Emission(NamedTuple):
    """What one step adds to one request; `start` is the output position of the first of `tokens`."""

    request: Request
    start: int
    tokens: list[int]
    finish: Finish
    logprobs: list[TokenLogprobs | None] | None  # one a token


class Scheduler:
    """The batch of one engine.

    The key is taken when a request starts to wait; set `drifts` if it changes with time while a request waits,
    and the queue is put in order anew at each plan.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        max_mixed_tokens: int = 0,
        key: Key = fcfs,
        drifts: bool = False,
    ) -> None:
        """`max_mixed_tokens`: most tokens of a step with decodes and chunks, but that a block's worth of chunks may
        always go beside the decodes; 0: `max_batch_tokens`."""
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_batch_tokens
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)  # a step has a token for everyone in the batch
        self.max_model_len = max_model_len
        self.max_len = min(max_model_len, blocks.capacity * blocks.block_size)  # prompt and output, tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: dict[int, Request] = {}  # by rid, in order of admission
        self.waiting = WaitingQueue()
        self.held_slots = 0  # places in the batch kept for requests that are not in it: reserved or detached
        self.num_preemptions = 0
        self.prefix_query_tokens = 0  # of all requests, at their first admission
        self.prefix_hit_tokens = 0  # of those, found in the prefix cache
        self._key = key
        self._drifts = drifts
        self._plans = 0
        self._unsettled: dict[int, int] = {}  # block: number of the last plan that may write to it in vain

    # -- facts for the board -------------------------------------------------------------------

    @property
    def head_demand_blocks(self) -> int:
        """Blocks of the first waiting request; 0 if none waits."""
        head = self.waiting.head
        return self.blocks.blocks_for(len(head.tokens)) if head else 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens to compute, of waiting requests."""
        return self.waiting.tokens

    @property
    def pending_prefill_tokens(self) -> int:
        """Tokens to compute, of waiting and half-prefilled requests."""
        _, prefilling = _split(self.running.values())
        return self.waiting.tokens + sum(request.pending for request in prefilling)

    # -- coming and going ----------------------------------------------------------------------

    def get(self, rid: int) -> Request | None:
        """The unfinished request of that id, running or waiting."""
        return self.running.get(rid) or self.waiting.get(rid)

    def refuse(self, request: Request) -> str | None:
        """Why this request can never run here, for the client; None if it can."""
        length = len(request.tokens)
        if not length:
            return "the prompt is empty"
        if length >= self.max_model_len:
            return f"{length} tokens leave no room for output: the model takes {self.max_model_len}"
        if length >= self.max_len:
            return f"{length} tokens leave no room for output: the KV memory holds {self.max_len}"
        return None

    def add(self, request: Request) -> bool:
        """Queue a request. It may bring output (a resumed one): that is prefilled with the prompt.

        False, and nothing changes, if the same request is here at this epoch or a newer one; an older one
        makes way. Raises ValueError for what `refuse` refuses.
        """
        if reason := self.refuse(request):
            raise ValueError(reason)
        held = self.get(request.rid)
        if held and not self.cancel(held.rid, request.epoch - 1):
            return False
        self.waiting.push(request, self._urgency(request, request.params.arrival))
        return True

    def cancel(self, rid: int, epoch: int) -> bool:
        """Drop request `rid` if it is here at `epoch` or an older one, and free its blocks at once.

        A step in flight may still write to them; `apply_result` ignores its row.
        """
        request = self.get(rid)
        if request is None or request.epoch > epoch:
            return False
        self._end(request, Finish.CANCELLED)
        return True

    def preempt(self, request: Request, now: float) -> None:
        """Send a running request back to the queue. Its tokens stay, its KV is computed anew (or found cached)."""
        self._leave(request)
        request.preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request, self._urgency(request, now))

    def reprioritise(self, request: Request, priority: int) -> None:
        """Give a request another class. One that waits gets its new place in the queue, by the key it has; one that
        runs counts in its new class from the next plan on; one that is detached or pending just keeps it."""
        if self.waiting.get(request.rid) is not request:
            request.params = replace(request.params, priority=priority)
            return
        _, key, rid = self.waiting.remove(request)
        request.params = replace(request.params, priority=priority)
        self.waiting.push(request, (priority, key, rid))

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request.rid in self.running:
            self._leave(request)
        else:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        del self.running[request.rid]
        self._clear(request)

    def _clear(self, request: Request) -> None:
        if request.in_flight:
            first = request.num_computed // self.blocks.block_size
            self._unsettled.update(dict.fromkeys(request.block_table[first:], self._plans))
        self.blocks.free(request.block_table)
        request.block_table = []
        request.num_computed = request.num_inflight_tokens = 0
        request.num_sampling = request.held = False

    # -- migration: in and out of the batch with the KV ----------------------------------------

    def reserve(self) -> bool:
        """Keep a place in the batch for a request that is to `attach`; False if none is left."""
        if len(self.running) + self.held_slots >= self.max_num_seqs:
            return False
        self.held_slots += 1
        return True

    @property
    def num_unsettled(self) -> int:
        """Blocks that `allocate_settled` leaves out, at most."""
        return len(self._unsettled)

    def allocate_settled(self, n: int) -> list[int]:
        """`n` free blocks for a peer to write to: to none of them may a step in flight still write, on behalf of a
        request that has left. Raises PoolError, and takes none, if there are fewer."""
        return self.blocks.allocate(n, avoid=self._unsettled)

    def unreserve(self) -> None:
        """Give up a place that `reserve` has kept."""
        self.held_slots -= 1

    def hold(self, request: Request) -> None:
        """Leave a running request out of the plans to come, so that it can be detached when no step has it."""
        request.held = True

    def release(self, request: Request) -> None:
        """Take a held request into the plans again."""
        request.held = False

    def detach(self, request: Request) -> None:
        """Take a running request out of the batch: it keeps its blocks and its place, and nobody preempts it.

        Raises ValueError while a step in flight contains it.
        """
        if request.in_flight:
            raise ValueError(f"request {request.rid} is in a step in flight")
        request.held = False
        del self.running[request.rid]
        self.held_slots += 1

    def attach(self, request: Request) -> None:
        """Put a request that holds its blocks into the place kept for it, and make its full blocks findable.

        An older epoch of it makes way. Raises ValueError if its blocks have no room for all its tokens but the
        last, or if it is here at this epoch or a newer one.
        """
        if self.blocks.blocks_for(len(request.tokens) - 1) > len(request.block_table):
            raise ValueError(f"request {request.rid} brings too few blocks for {len(request.tokens)} tokens")
        held = self.get(request.rid)
        if held and not self.cancel(held.rid, request.epoch - 1):
            raise ValueError(f"request {request.rid} is here at epoch {held.epoch}")
        self.held_slots -= 1
        self.running[request.rid] = request
        self._name(request, 0, request.num_computed // self.blocks.block_size)

    def discard(self, request: Request) -> None:
        """Free the blocks and the place of a detached request."""
        self.held_slots -= 1
        request.finish = Finish.CANCELLED
        self._clear(request)

    def prefix_hashes(self, request: Request) -> list[bytes]:
        """Names of the full blocks whose KV is computed; none without prefix caching."""
        if not self.blocks.prefix_caching:
            return []
        self._hash(request)
        return request.hashes[: request.num_computed // self.blocks.block_size]

    # -- planning ------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. `now`: seconds, for the ordering key.

        It counts as in flight from now on: `apply_result` it, in turn.
        """
        if self._drifts:
            self.waiting.reorder(lambda request: self._urgency(request, now))
        # Who was preempted for want of blocks would only be in the way again.
        preempted = self._grow(now) or self._admit(now)
        decoding, prefilling = _split(r for r in self.running.values() if not self._rests(r))
        rows = [_row(request, 1) for request in decoding]
        rows += self._chunks(prefilling, self._budget(len(decoding)) - len(decoding), now)
        if not rows:
            return None
        self._plans += 1
        for row in rows:
            row.request.num_inflight_tokens += row.count
            row.request.num_sampling = row.sample
        return StepPlan(rows, len(decoding), preempted, self._plans)

    def _budget(self, decodes: int) -> int:
        """Tokens of a step with so many decodes."""
        if not decodes:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(self.max_mixed_tokens, decodes + self.blocks.block_size))

    def _rests(self, request: Request) -> bool:
        """Nothing of it is to be computed: it is held, or the token being drawn is its last."""
        output = request.length - request.prompt_len
        return request.held or (request.num_sampling and self._is_last(request, output, request.length))

    def _grow(self, now: float) -> list[Request]:
        """Give every running request room for its known tokens; returns whom that cost its place."""
        size = self.blocks.block_size
        growing = [r for r in self.running.values() if r.length > len(r.block_table) * size and not self._rests(r)]
        preempted = []
        while not self.blocks.can_allocate(len(growing)):
            victim = max(self.running.values(), key=lambda r: self._urgency(r, now))
            self.preempt(victim, now)
            preempted.append(victim)
            growing = [r for r in growing if r is not victim]
        for request, block in zip(growing, self.blocks.allocate(len(growing)), strict=True):
            request.block_table.append(block)
        return preempted

    def _admit(self, now: float) -> list[Request]:
        """Fill the batch from the queue; returns whom a more urgent class displaced."""
        if not self.waiting:
            return []
        budget = self._budget(sum(r.pending == 1 for r in self.running.values()))
        num_inflight_tokens = sorted(self.running.values(), key=lambda r: -r.params.priority)
        preempted: list[Request] = []
        while head := self.waiting.head:
            while num_inflight_tokens and num_inflight_tokens[-1].params.priority <= head.params.priority:
                budget -= num_inflight_tokens.pop().pending
            if budget <= 0 or not (self._fits(head) or self._displace(head, preempted, now)):
                break
            self._enter(head, now)
            budget -= head.pending
        return preempted

    def _fits(self, request: Request) -> bool:
        """Whether there is a slot, and the blocks, and one block more for each running request to grow into."""
        if len(self.running) + self.held_slots >= self.max_num_seqs:
            return False
        reserve = len(self.running)
        # Whatever is cached, at least one block is new: spare a hopeless request the look-up.
        can_allocate = self.blocks.can_allocate
        return can_allocate(1 + reserve) and can_allocate(self._demand(request) + reserve)

    def _demand(self, request: Request) -> int:
        """Free blocks that admitting `request` would use up now."""
        matched = self._match(request)
        return self.blocks.blocks_for(len(request.tokens)) - len(matched) + self.blocks.num_idle(matched)

    def _displace(self, head: Request, preempted: list[Request], now: float) -> bool:
        """Preempt requests of less urgent classes, least urgent first, until `head` fits; none if it cannot."""
        victims = [r for r in self.running.values() if r.params.priority > head.params.priority]
        reclaimable = sum(len(r.block_table) for r in victims)
        if not victims or self._demand(head) > self.blocks.num_free + reclaimable:
            return False
        victims.sort(key=lambda r: self._urgency(r, now))
        while victims and not self._fits(head):
            preempted.append(victims.pop())
            self.preempt(preempted[-1], now)
        return self._fits(head)

    def _enter(self, request: Request, now: float) -> None:
        self.waiting.remove(request)
        matched = self._match(request)
        self.blocks.acquire(matched)
        fresh = self.blocks.blocks_for(len(request.tokens)) - len(matched)
        request.block_table = matched + self.blocks.allocate(fresh)
        request.num_computed = len(matched) * self.blocks.block_size
        self.running[request.rid] = request
        if request.admitted < 0:
            request.admitted = now
            request.num_cached = min(request.num_computed, request.prompt_len)
            self.prefix_query_tokens += request.prompt_len
            self.prefix_hit_tokens += request.num_cached

    def _chunks(self, prefilling: list[Request], budget: int, now: float) -> list[Row]:
        """Prefill rows of at most `budget` tokens together, the most urgent request's first."""
        rows = []
        for request in sorted(prefilling, key=lambda r: self._urgency(r, now)):
            count = min(request.pending, budget)
            if count:
                rows.append(_row(request, count))
            budget -= count
        return rows

    def _match(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning. At least one token is left to compute: it gives the logits."""
        if not self.blocks.prefix_caching:
            return []
        self._hash(request)
        return self.blocks.match(request.hashes[: (len(request.tokens) - 1) // self.blocks.block_size])

    def _hash(self, request: Request) -> None:
        if len(request.hashes) < len(request.tokens) // self.blocks.block_size:
            salt = request.params.cache_salt
            request.hashes = block_hashes(request.tokens, self.blocks.block_size, salt, request.hashes)

    def _urgency(self, request: Request, now: float) -> Urgency:
        return request.params.priority, self._key(request, now), request.rid

    # -- folding -------------------------------------------------------------------------------

    def apply_result(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]:
        """Take in what the step computed; returns what the frontends must hear, in the order of the rows.

        A row whose request has been cancelled or preempted since the plan is ignored; one that was shed ends its
        request, and its blocks stay unnamed.
        """
        self._unsettled = {block: number for block, number in self._unsettled.items() if number > plan.number}
        emissions = []
        drawn = zip(result.tokens, result.logprobs or repeat(None))  # noqa: B905
        for i, row in enumerate(plan.rows):
            request = row.request
            token, logprobs = next(drawn) if row.sample else (-1, None)
            if self.running.get(request.rid) is not request or request.preemptions != row.preemptions:
                continue
            request.num_inflight_tokens -= row.count
            if i in result.dropped:
                emissions.append(self._append(request, NO_TOKEN, None))
                continue
            self._advance(request, row.start + row.count)
            if row.sample:
                emissions.append(self._append(request, token, logprobs))
        return emissions

    def _advance(self, request: Request, computed: int) -> None:
        """Note that the KV of the first `computed` tokens is there, and make the blocks it filled findable."""
        first = request.num_computed // self.blocks.block_size
        full = computed // self.blocks.block_size
        request.num_computed = computed
        self._name(request, first, full)

    def _name(self, request: Request, first: int, full: int) -> None:
        """Make the blocks from `first` to before `full`, all computed, findable."""
        if full > first and self.blocks.prefix_caching:
            self._hash(request)
            self.blocks.register(request.block_table[first:full], request.hashes[first:full])

    def _append(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> Emission:
        start = request.num_output
        if not request.in_flight:
            request.num_sampling = False
        if token == NO_TOKEN:
            self._end(request, Finish.ERROR)
            return Emission(request, start, [], Finish.ERROR, None)
        request.tokens.append(token)
        finish = self._finish(request, token)
        if finish:
            self._end(request, finish)
        return Emission(request, start, [token], finish, None if logprobs is None else [logprobs])

    def _finish(self, request: Request, token: int) -> Finish:
        """Whether `token`, just appended, ends the request."""
        sampling = request.params.sampling
        stop = token in sampling.stop_token_ids or (token in self.eos_token_ids and not sampling.ignore_eos)
        length = request.num_output
        if stop and length >= sampling.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if self._is_last(request, length, len(request.tokens)) else Finish.NONE

    def _is_last(self, request: Request, num_output: int, length: int) -> bool:
        """Whether no token may follow so many."""
        return num_output >= request.sampling.max_tokens or length >= self.max_len

    # -- invariants ----------------------------------------------------------------------------

    def check(self, others: Iterable[Sequence[int]] = ()) -> None:
        """Compare batch, queue and blocks; `others` are tables held outside the batch.

        Raises PoolError at the first flaw.
        """
        for request in (*self.running.values(), *self.waiting):
            if flaw := self._flaw(request):
                raise PoolError(f"request {request.rid} {flaw}")
        self.blocks.check([*(r.block_table for r in self.running.values()), *others])

    def _flaw(self, request: Request) -> str | None:
        waits = self.waiting.get(request.rid) is request
        if waits == (request.rid in self.running):
            return "both waits and runs"
        if waits and (request.block_table or request.num_computed):
            return "waits and holds blocks"
        if request.num_computed + request.num_inflight_tokens > len(request.block_table) * self.blocks.block_size:
            return "has computed more tokens than its blocks hold"
        if request.pending < 1:
            return "has nothing to compute"
        return None


def _split(requests: Iterable[Request]) -> tuple[list[Request], list[Request]]:
    """Those that need one token computed, and those that need more: the decoding and the half-prefilled."""
    decoding: list[Request] = []
    prefilling: list[Request] = []
    for request in requests:
        (decoding if request.pending == 1 else prefilling).append(request)
    return decoding, prefilling


def _row(request: Request, count: int) -> Row:
    """The next `count` tokens to compute."""
    return Row(
        request,
        request.num_computed + request.num_inflight_tokens,
        count,
        count == request.pending,
        request.preemptions,
    )
