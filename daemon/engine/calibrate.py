"""Times a few steps of a freshly loaded runner, so that policies know what its steps cost.

Every row is a request of its own that writes the dummy block alone and reads blocks that nobody holds yet. Steps
come in rounds, smallest first; whatever is slow to run for the first time, or is disturbed, is better in the next.
Rounds go on, past the budget too, until one brings nothing new: an engine often starts where others are at work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from daemon.engine.cost import Observation, StepCost, fit
from daemon.engine.request import Request
from daemon.engine.runner import Row, Runner, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams

BUDGET = 0.2  # seconds
DEVICE_BUDGET = 2.0
"""Seconds for a GPU: its largest steps are so large, and cost so much more a token than those that wait for the
weights alone, that they must be among the timed ones."""
PATIENCE = 5  # times the budget, on a machine where no round is like the one before
_ROUNDS = 5  # at most, once they are alike
_BETTER = 0.95  # of a step's time before, and it was disturbed then
_INDISPENSABLE = 3  # steps: the least that tell the three terms of the cost apart
_BATCH, _GROWTH = 16, 4  # rows of the first batch beyond 1, and from one batch to the next
_SHORT, _LONG = 8, 256  # tokens of context of a decode row
_CHUNK = 64  # tokens of a prefill row: so few that attention hardly counts


def calibrate(
    runner: Runner,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """What a step of `runner` costs. For use before the first request: of the pool's `num_blocks` blocks the dummy
    is written, and any is read.

    It takes at most `budget` seconds and a round to see whether it was disturbed; PATIENCE times as many where it is
    again and again, longer only with a runner so slow that even the indispensable steps do.
    """
    end = clock() + budget
    steps: list[_Step] = []
    for step in _steps(runner.max_model_len, num_blocks, block_size, max_num_seqs, max_batch_tokens):
        step.time(runner, clock)
        steps.append(step)
        if len(steps) >= _INDISPENSABLE and clock() > end - budget * 2 / 3:  # the rest is for rounds of these
            break
    rounds, disturbed = 1, True
    while disturbed or rounds < _ROUNDS:
        last = end + (PATIENCE - 1) * budget if disturbed else end
        better = [step.time(runner, clock) for step in steps if clock() < last]
        if len(better) < len(steps):
            break
        rounds, disturbed = rounds + 1, any(better)
    return fit(step.fastest for step in steps)


class _Step:
    """A plan, and the fastest that it has been."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        kv = sum(row.start + row.count for row in plan.rows)
        self.fastest = Observation(plan.num_tokens, kv, math.inf)

    def time(self, runner: Runner, clock: Callable[[], float]) -> bool:
        """Whether it was clearly faster than ever."""
        start = clock()
        runner.execute(self._plan)
        seconds, before = clock() - start, self.fastest.seconds
        self.fastest = self.fastest._replace(seconds=min(seconds, before))
        return seconds < _BETTER * before


def _steps(
    max_model_len: int, num_blocks: int, block_size: int, max_num_seqs: int, max_batch_tokens: int
) -> Iterator[_Step]:
    """Decode batches with short and with long context, then prefill chunks, each larger than the one before."""
    longest = min(max_model_len, (num_blocks - 1) * block_size)
    pool = _Pool(num_blocks, block_size)
    most = min(max_num_seqs, max_batch_tokens)
    yield _Step(_decodes(pool, 1, min(_SHORT, longest)))
    for batch in _growing(min(_BATCH, most), most):
        for length in (_SHORT, _LONG):
            yield _Step(_decodes(pool, batch, min(length, longest)))
    chunk = min(_CHUNK, longest)
    for count in _growing(1, min(max_batch_tokens // chunk, max_num_seqs)):
        yield _Step(StepPlan([pool.row(0, chunk) for _ in range(count)], 0))


def _decodes(pool: _Pool, batch: int, length: int) -> StepPlan:
    return StepPlan([pool.row(length - 1, 1) for _ in range(batch)], batch)


def _growing(first: int, last: int) -> Iterator[int]:
    """first, 4 * first, ..., and last; nothing if that is less."""
    while first < last:
        yield first
        first *= _GROWTH
    if last:
        yield last


class _Pool:
    """Makes rows that spread over the pool, so that KV comes from memory and not from a cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._next = 0

    def row(self, start: int, count: int) -> Row:
        """One that reads any blocks and, from position `start` on, writes the dummy."""
        reads = start // self._block_size
        writes = -(-(start + count) // self._block_size) - reads
        table = [1 + (self._next + i) % (self._num_blocks - 1) for i in range(reads)] + [0] * writes
        self._next += reads
        params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
        length = start + count
        request = Request(-1, 0, 0, params, tokens=[0] * length, prompt_len=length, block_table=table)
        return Row(request, start, count, True)
