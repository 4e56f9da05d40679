"""Measures what steps of a freshly loaded runner cost, for the scheduling policies.

Each row is a separate request that writes only the dummy block and reads blocks that no request holds yet. Steps run
in rounds, smallest first: a step that was slow because it ran for the first time, or because other work disturbed
it, is faster in the next round. Rounds continue, even past the budget, until one brings no improvement and each time
is confirmed by a second run: an engine often starts while other processes use the machine.

A CPU engine is timed by the CPU time of its main thread, which computes its part of every parallel loop. On a quiet
machine that is the time on the wall. On a busy one the time on the wall contains what other processes compute, and
long steps contain more of it than short ones, so even the fastest of many runs would be wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from daemon.engine.cost import INDISPENSABLE, StepTime
from daemon.engine.request import Request
from daemon.engine.runner import Row, Runner, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams

BUDGET = 0.2  # seconds
DEVICE_BUDGET = 2.0
"""Seconds for a GPU. Its largest steps must be among the measured ones: they are so large that they cost much more
per token than the steps that only wait for the weights."""
PATIENCE = 5  # times the budget, on a machine where each round differs from the one before
_ROUNDS = 5  # at most, once a round brings no improvement
_BETTER = 0.95  # of a step's earlier time: a step this fast or faster shows that the earlier run was disturbed
_MIN_ROUNDS = 2  # a time that no second run confirms is not used
_BATCH, _GROWTH = 16, 4  # rows of the first batch larger than 1, and the factor from one batch to the next
_SHORT, _LONG = 8, 512  # tokens of context of a decode row
_TOKEN_STRIDE = 7919  # a prime: tokens of neighbours are far apart
_CHUNK = 64  # tokens of a prefill row: few enough that the cost of attention is negligible


def calibrate(
    runner: Runner,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> list[StepTime]:
    """Return how long steps of several sizes take. Call it before the first request: of the pool's `num_blocks`
    blocks it writes the dummy and reads any.

    It takes at most `budget` seconds of `clock` and one round more, to see whether it was disturbed; PATIENCE times
    as many if it is disturbed again and again. It takes longer only if the runner is so slow that two rounds of the
    indispensable steps do.
    """
    end = clock() + budget
    steps: list[_Step] = []
    rows = _RowFactory(num_blocks, block_size, runner.vocab_size)
    for step in _steps(rows, runner.max_model_len, max_num_seqs, max_batch_tokens):
        step.time(runner, clock)
        steps.append(step)
        if len(steps) >= INDISPENSABLE and clock() > end - budget * 2 / 3:  # the rest is for more rounds
            break
    rounds, disturbed = 1, True
    while disturbed or rounds < _ROUNDS:
        last = end + (PATIENCE - 1) * budget if disturbed else end
        if rounds < _MIN_ROUNDS:
            last = math.inf
        better = [step.time(runner, clock) for step in steps if clock() < last]
        if len(better) < len(steps):
            break
        rounds, disturbed = rounds + 1, any(better) or not all(step.times.confirmed for step in steps)
    return [step.times for step in steps]


class _Step:
    """A plan and its fastest runs."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        kv = sum(row.start + row.count for row in plan.rows)
        self.times = StepTime(plan.num_tokens, kv, math.inf)

    def time(self, runner: Runner, clock: Callable[[], float]) -> bool:
        """Run the step; return True if it was clearly faster than every earlier run."""
        start = clock()
        runner.execute(self._plan)
        seconds, before = clock() - start, self.times.fastest
        self.times = self.times.run(seconds)
        return seconds < _BETTER * before


def _steps(rows: _RowFactory, max_model_len: int, max_num_seqs: int, max_batch_tokens: int) -> Iterator[_Step]:
    """Yield decode batches with short and long context, then prefill chunks, in order of size."""
    longest = min(max_model_len, rows.longest)
    most = min(max_num_seqs, max_batch_tokens)
    yield _Step(_decodes(rows, 1, min(_SHORT, longest)))
    for batch in _growing(min(_BATCH, most), most):
        for length in (_SHORT, _LONG):
            yield _Step(_decodes(rows, batch, min(length, longest)))
    chunk = min(_CHUNK, longest)
    for count in _growing(1, min(max_batch_tokens // chunk, max_num_seqs)):
        yield _Step(StepPlan([rows.row(0, chunk) for _ in range(count)], 0))


def _decodes(rows: _RowFactory, batch: int, length: int) -> StepPlan:
    return StepPlan([rows.row(length - 1, 1) for _ in range(batch)], batch)


def _growing(first: int, last: int) -> Iterator[int]:
    """Yield first, 4 * first, ... and last; nothing if last is 0."""
    while first < last:
        yield first
        first *= _GROWTH
    if last:
        yield last


class _RowFactory:
    """Makes rows that are spread over the pool, so that KV comes from memory and not from a cache.

    Their tokens are spread over the vocabulary: equal tokens would all choose the same experts of a mixture.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._next = 0
        self._tokens = 0  # in the rows until now

    @property
    def longest(self) -> int:
        """Most tokens that a row can have."""
        return (self._num_blocks - 1) * self._block_size

    def row(self, start: int, count: int) -> Row:
        """Return a row that reads arbitrary blocks and, from position `start` on, writes the dummy block."""
        reads = start // self._block_size
        writes = -(-(start + count) // self._block_size) - reads
        table = [1 + (self._next + i) % (self._num_blocks - 1) for i in range(reads)] + [0] * writes
        self._next += reads
        params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
        length = start + count
        tokens = [(self._tokens + i) * _TOKEN_STRIDE % self._vocab_size for i in range(length)]
        self._tokens += length
        request = Request(
            rid=-1, epoch=0, frontend=0, params=params, tokens=tokens, prompt_len=length, block_table=table
        )
        return Row(request, start, count, True)
