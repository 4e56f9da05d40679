"""Decides for each step which tokens of which requests are computed. Pure.

`plan` determines the batch, then divides the step's token budget into rows:

1. Grow: each running request gets a block if its next token needs one. If no block is left, the least urgent request
   is preempted: its blocks are freed, its tokens are kept, and its KV is recomputed later.
2. Admit: requests move from the head of the queue into the batch while places, blocks and tokens last. A request of
   a more urgent class may preempt requests of less urgent classes. No request overtakes the head, so a large request
   does not starve.
3. Rows: all decodes, then prefill chunks by urgency. Chunks may be limited beside decodes (`max_mixed_tokens`),
   because each decode waits for the whole step.

At admission a request gets the blocks for all its known tokens, so a prefill that has begun never waits for memory.
A request that is `unready` is prefilled up to its last known token, whose row would sample.
Urgency is ``(class, key(request, now), rid)``; the smallest goes first. `apply_result` applies the step's result.

A step may be planned while the previous one is in flight, that is, planned but not applied. Its decodes then compute
tokens that are not known yet. Results are applied in the order of the plans. When a request turns out to have ended,
the next step wastes one row. The blocks of that request are free at once, because later steps write to them later.
Only a peer must not get them before that row is computed: the peer's writes are not ordered with the device's
(`allocate_settled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

from msgspec.structs import replace

from daemon.engine.request import Request
from daemon.engine.rows import next_row, split_decodes
from daemon.engine.runner import NO_TOKEN, NOT_ONE, NOT_YET, Row, StepPlan, StepResult
from daemon.engine.waiting_queue import Urgency, WaitingQueue
from daemon.ipc.messages import Finish, TokenLogprobs
from daemon.ipc.prompt_logprobs import PromptLogprobs
from daemon.kvpool.block_manager import BlockManager, PoolError

Key = Callable[[Request, float], float]


def fcfs(request: Request, _now: float) -> float:
    """Return the arrival: first come, first served. A preempted request keeps its arrival, so it comes back first."""
    return request.params.arrival


_FAILURES = {NO_TOKEN: Finish.ERROR, NOT_ONE: Finish.DEAD_END}  # what a token that stands for none makes of a request


class Emission(NamedTuple):
    """The output that one step adds to one request; `start` is the output position of the first of `tokens`."""

    request: Request
    start: int
    tokens: list[int]
    finish: Finish
    logprobs: list[TokenLogprobs | None] | None  # one per token
    prompt_logprobs: PromptLogprobs | None = None


class Scheduler:
    """The batch and the queue of one engine. The key of a request is computed when the request starts to wait."""

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
    ) -> None:
        """`max_mixed_tokens`: token limit of a step with both decodes and prefill chunks; 0: `max_batch_tokens`. One
        block of prefill is allowed beside the decodes even above this limit."""
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_batch_tokens
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)  # a step has a token for each request in the batch
        self.max_model_len = max_model_len
        self.max_len = min(max_model_len, blocks.capacity * blocks.block_size)  # prompt and output, tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: dict[int, Request] = {}  # by rid, in order of admission
        self.waiting = WaitingQueue()
        self.num_reserved_places = 0  # in the batch, for requests outside it: reserved by a peer, or detached
        self.num_preemptions = 0
        self.prefix_query_tokens = 0  # of all requests, at their first admission
        self.prefix_hit_tokens = 0  # of those, found in the prefix cache
        self._key = key
        self._num_plans = 0
        self._unsettled: dict[int, int] = {}  # block: number of the last plan that may write to it though it is free

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
        _, prefilling = split_decodes(self.running.values())
        return self.waiting.tokens + sum(request.pending for request in prefilling)

    # -- requests come and go ------------------------------------------------------------------

    def get(self, rid: int) -> Request | None:
        """Return the unfinished request of that id, running or waiting."""
        return self.running.get(rid) or self.waiting.get(rid)

    def refuse(self, request: Request) -> str | None:
        """Return why this request can never run here, as text for the client; None if it can run."""
        length = len(request.tokens)
        if not length:
            return "the prompt is empty"
        needed = length + min(1, request.sampling.max_tokens)
        if needed > self.max_model_len:
            return f"{length} tokens leave no room for output: the model takes {self.max_model_len}"
        if needed > self.max_len:
            return f"{length} tokens leave no room for output: the KV memory holds {self.max_len}"
        return None

    def add(self, request: Request) -> bool:
        """Queue a request. It may contain output (a resumed request): that is prefilled with the prompt.

        Return False, and change nothing, if the same request is here at this epoch or a newer one. An older epoch of
        it is cancelled. Raises ValueError for a request that `refuse` refuses.
        """
        if reason := self.refuse(request):
            raise ValueError(reason)
        present = self.get(request.rid)
        if present and not self.cancel(present.rid, request.epoch - 1):
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
        """Move a running request back to the queue. Its tokens stay; its KV is recomputed, or found in the cache."""
        self._remove_from_batch(request)
        request.preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request, self._urgency(request, now))

    def reprioritise(self, request: Request, priority: int) -> None:
        """Give a request another class.

        A waiting request gets a new position in the queue, with the key that it has. A running one counts in the new
        class from the next plan on. A detached or pending one only stores it.
        """
        if self.waiting.get(request.rid) is not request:
            request.params = replace(request.params, priority=priority)
            return
        _, key, rid = self.waiting.remove(request)
        request.params = replace(request.params, priority=priority)
        self.waiting.push(request, (priority, key, rid))

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request.rid in self.running:
            self._remove_from_batch(request)
        else:
            self.waiting.remove(request)

    def _remove_from_batch(self, request: Request) -> None:
        del self.running[request.rid]
        self._free_blocks(request)

    def _free_blocks(self, request: Request) -> None:
        """Free the request's blocks and reset its progress."""
        if request.in_flight:
            first = request.num_computed // self.blocks.block_size
            self._unsettled.update(dict.fromkeys(request.block_table[first:], self._num_plans))
        self.blocks.free(request.block_table)
        request.block_table = []
        request.num_computed = request.num_inflight_tokens = 0
        request.num_sampling = request.paused = False

    # -- migration: in and out of the batch with the KV ----------------------------------------

    def reserve(self) -> bool:
        """Reserve a place in the batch for a request that will `attach`; return False if none is left."""
        if len(self.running) + self.num_reserved_places >= self.max_num_seqs:
            return False
        self.num_reserved_places += 1
        return True

    def unreserve(self) -> None:
        """Give up a place that `reserve` has reserved."""
        self.num_reserved_places -= 1

    @property
    def num_unsettled(self) -> int:
        """Upper bound of the free blocks that `allocate_settled` skips."""
        return len(self._unsettled)

    def allocate_settled(self, n: int) -> list[int]:
        """Return `n` free blocks for a peer to write to. Skip the blocks that a step in flight may still write for a
        request that has left the batch. Raises PoolError, and takes none, if there are fewer."""
        return self.blocks.allocate(n, avoid=self._unsettled)

    def pause(self, request: Request) -> None:
        """Leave a running request out of the next plans, so that it can be detached once no step contains it."""
        request.paused = True

    def unpause(self, request: Request) -> None:
        """Plan a paused request again."""
        request.paused = False

    def detach(self, request: Request) -> None:
        """Take a running request out of the batch. It keeps its blocks and its place, and is never preempted.

        Raises ValueError while a step in flight contains it.
        """
        if request.in_flight:
            raise ValueError(f"request {request.rid} is in a step in flight")
        request.paused = False
        del self.running[request.rid]
        self.num_reserved_places += 1

    def attach(self, request: Request) -> None:
        """Put a request that holds its blocks into its reserved place, and add its full blocks to the prefix cache.

        An older epoch of it is cancelled. Raises ValueError if its blocks have no room for all its tokens but the
        last, or if it is here at this epoch or a newer one.
        """
        if self.blocks.blocks_for(len(request.tokens) - 1) > len(request.block_table):
            raise ValueError(f"request {request.rid} has too few blocks for {len(request.tokens)} tokens")
        present = self.get(request.rid)
        if present and not self.cancel(present.rid, request.epoch - 1):
            raise ValueError(f"request {request.rid} is here at epoch {present.epoch}")
        self.num_reserved_places -= 1
        self.running[request.rid] = request
        self._register_blocks(request, 0, request.num_computed // self.blocks.block_size)

    def discard(self, request: Request) -> None:
        """Free the blocks and the place of a detached request."""
        self.num_reserved_places -= 1
        request.finish = Finish.CANCELLED
        self._free_blocks(request)

    def prefix_hashes(self, request: Request) -> list[bytes]:
        """Return the hashes of the full blocks whose KV is computed; none without prefix caching."""
        if not self.blocks.prefix_caching:
            return []
        self._update_hashes(request)
        return request.hashes[: request.num_computed // self.blocks.block_size]

    # -- planning ------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """Return the next step, or None if there is nothing to compute. `now`: seconds, for the ordering key.

        The step counts as in flight until `apply_result` is called for it, in the order of the plans.
        """
        # After a preemption for lack of blocks admit nothing: the request would be preempted again.
        preempted = self._grow_tables(now) or self._admit(now)
        decoding, prefilling = split_decodes(r for r in self.running.values() if self._is_plannable(r))
        rows = [next_row(request, 1) for request in decoding]
        rows += self._prefill_rows(prefilling, self._budget(len(decoding)) - len(decoding), now)
        if not rows:
            return None
        self._num_plans += 1
        for row in rows:
            row.request.num_inflight_tokens += row.count
            row.request.num_sampling = row.sample
        return StepPlan(rows, len(decoding), preempted, self._num_plans)

    def _budget(self, num_decodes: int) -> int:
        """Return the token budget of a step with that many decodes."""
        if not num_decodes:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(self.max_mixed_tokens, num_decodes + self.blocks.block_size))

    def _is_plannable(self, request: Request) -> bool:
        """Return False if the request is paused, if all that is left is to sample and it may not do so yet, or if the
        token being sampled for it is its last."""
        if request.paused or (request.unready and request.pending == 1):
            return False
        output = request.length - request.prompt_len
        return not (request.num_sampling and self._is_last(request, output, request.length))

    def _grow_tables(self, now: float) -> list[Request]:
        """Give each running request blocks for its known tokens; return the requests that were preempted for it."""
        size = self.blocks.block_size
        growing = [r for r in self.running.values() if r.length > len(r.block_table) * size and self._is_plannable(r)]
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
        """Fill the batch from the queue; return the requests that a more urgent class has preempted."""
        if not self.waiting:
            return []
        budget = self._budget(sum(r.pending == 1 for r in self.running.values()))
        goes_first = sorted(self.running.values(), key=lambda r: -r.params.priority)  # the most urgent class last
        preempted: list[Request] = []
        while head := self.waiting.head:
            while goes_first and goes_first[-1].params.priority <= head.params.priority:
                budget -= goes_first.pop().pending
            if budget <= 0 or not (self._fits(head) or self._preempt_for(head, preempted, now)):
                break
            self._move_to_batch(head, now)
            budget -= head.pending
        return preempted

    def _fits(self, request: Request) -> bool:
        """Return True if there are a place and blocks for it, and one block more for each running request to grow."""
        if len(self.running) + self.num_reserved_places >= self.max_num_seqs:
            return False
        reserve = len(self.running)
        # At least one block is new, whatever the cache holds: without it skip the look-up.
        can_allocate = self.blocks.can_allocate
        return can_allocate(1 + reserve) and can_allocate(self._demand(request) + reserve)

    def _demand(self, request: Request) -> int:
        """Return the number of free blocks that admitting the request would take now."""
        matched = self._match_prefix(request)
        return self.blocks.blocks_for(len(request.tokens)) - len(matched) + self.blocks.num_idle(matched)

    def _preempt_for(self, head: Request, preempted: list[Request], now: float) -> bool:
        """Preempt requests of less urgent classes, least urgent first, until `head` fits; none if it cannot fit."""
        victims = [r for r in self.running.values() if r.params.priority > head.params.priority]
        reclaimable = sum(len(r.block_table) for r in victims)
        if not victims or self._demand(head) > self.blocks.num_free + reclaimable:
            return False
        victims.sort(key=lambda r: self._urgency(r, now))
        while victims and not self._fits(head):
            preempted.append(victims.pop())
            self.preempt(preempted[-1], now)
        return self._fits(head)

    def _move_to_batch(self, request: Request, now: float) -> None:
        self.waiting.remove(request)
        matched = self._match_prefix(request)
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

    def _prefill_rows(self, prefilling: list[Request], budget: int, now: float) -> list[Row]:
        """Return prefill rows with at most `budget` tokens in total, the most urgent request first."""
        rows = []
        for request in sorted(prefilling, key=lambda r: self._urgency(r, now)):
            count = min(request.pending - request.unready, budget)
            if count:
                rows.append(next_row(request, count))
            budget -= count
        return rows

    def _match_prefix(self, request: Request) -> list[int]:
        """Return the cached blocks of the request's prefix. What gives logits is left to compute: at least one token,
        and every one from the first on that is to be scored."""
        if not self.blocks.prefix_caching:
            return []
        self._update_hashes(request)
        end = request.num_scored if request.unscored else len(request.tokens) - 1
        return self.blocks.match(request.hashes[: end // self.blocks.block_size])

    def _update_hashes(self, request: Request) -> None:
        if len(request.hashes) < len(request.tokens) // self.blocks.block_size:
            request.hashes = self.blocks.hashes(request.tokens, request.params.cache_salt, request.hashes)

    def _urgency(self, request: Request, now: float) -> Urgency:
        return request.params.priority, self._key(request, now), request.rid

    # -- results -------------------------------------------------------------------------------

    def apply_result(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]:
        """Apply the result of a step; return the emissions for the frontends, in the order of the rows.

        A row is ignored if its request has been cancelled or preempted since the plan. A dropped row ends its
        request, and its blocks do not enter the prefix cache. With NOT_YET the last token counts as not computed.
        """
        self._unsettled = {block: number for block, number in self._unsettled.items() if number > plan.number}
        emissions = []
        sampled = zip(result.tokens, result.logprobs or repeat(None))  # noqa: B905
        scored = result.prompt_logprobs or {}
        for i, row in enumerate(plan.rows):
            request = row.request
            token, logprobs = next(sampled) if row.sample else (-1, None)
            if self.running.get(request.rid) is not request or request.preemptions != row.preemptions:
                continue
            request.num_inflight_tokens -= row.count
            if i in result.dropped:
                emissions.append(self._append(request, NO_TOKEN, None))
                continue
            postponed = row.sample and token == NOT_YET
            self._set_computed(request, row.start + row.count - postponed)
            new = PromptLogprobs(row.scored.start, scored[i]) if i in scored else None
            request.unscored -= len(row.scored)
            if postponed:
                request.num_sampling = False
            elif row.sample:
                emissions.append(self._append(request, token, logprobs, new))
                continue
            if new is not None:
                emissions.append(Emission(request, request.num_output, [], Finish.NONE, None, new))
        return emissions

    def _set_computed(self, request: Request, num_computed: int) -> None:
        """Note that the KV of the first `num_computed` tokens exists; add the newly full blocks to the cache."""
        first = request.num_computed // self.blocks.block_size
        end = num_computed // self.blocks.block_size
        request.num_computed = num_computed
        self._register_blocks(request, first, end)

    def _register_blocks(self, request: Request, first: int, end: int) -> None:
        """Add the blocks from `first` to before `end`, which must be computed, to the prefix cache."""
        if end > first and self.blocks.prefix_caching:
            self._update_hashes(request)
            self.blocks.register(request.block_table[first:end], request.hashes[first:end])

    def _append(
        self, request: Request, token: int, logprobs: TokenLogprobs | None, scored: PromptLogprobs | None = None
    ) -> Emission:
        """Append a sampled token, and end the request if it is the last one, NO_TOKEN or NOT_ONE."""
        start = request.num_output
        if not request.in_flight:
            request.num_sampling = False
        if token in _FAILURES:
            self._end(request, _FAILURES[token])
            return Emission(request, start, [], request.finish, None)
        if not request.sampling.max_tokens:  # the prompt is computed, and that was all
            self._end(request, Finish.LENGTH)
            return Emission(request, start, [], Finish.LENGTH, None, scored)
        request.tokens.append(token)
        finish = self._finish(request, token)
        if finish:
            self._end(request, finish)
        return Emission(request, start, [token], finish, None if logprobs is None else [logprobs], scored)

    def _finish(self, request: Request, token: int) -> Finish:
        """Return how `token`, just appended, ends the request; Finish.NONE if it does not."""
        sampling = request.params.sampling
        stop = token in sampling.stop_token_ids or (token in self.eos_token_ids and not sampling.ignore_eos)
        length = request.num_output
        if stop and length >= sampling.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if self._is_last(request, length, len(request.tokens)) else Finish.NONE

    def _is_last(self, request: Request, num_output: int, length: int) -> bool:
        """Return True if no token may follow this much output and total length."""
        return num_output >= request.sampling.max_tokens or length >= self.max_len

    # -- invariants ----------------------------------------------------------------------------

    def check(self, others: Iterable[Sequence[int]] = ()) -> None:
        """Compare batch, queue and blocks; `others` are block tables held outside the batch.

        Raises PoolError at the first inconsistency.
        """
        for request in (*self.running.values(), *self.waiting):
            if problem := self._inconsistency(request):
                raise PoolError(f"request {request.rid} {problem}")
        self.blocks.check([*(r.block_table for r in self.running.values()), *others])

    def _inconsistency(self, request: Request) -> str | None:
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
