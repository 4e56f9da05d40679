"""A runner whose output proves its KV pool: every token is a hash of all that the pool holds of the sequence.

Like a model with one layer. The KV of position i is its token id (K) and a digest of tokens 0..i (V). The draw
at position n reads all n slots through the block table, as attention would, so a block that is lost, stale,
misplaced or wrongly copied changes the tokens from there on. `expected_stream` tells what they ought to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from daemon.engine.fake.stub import certain
from daemon.engine.request import Request
from daemon.engine.runner import PoolSpec, Row, StepPlan, StepResult

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def expected_stream(prompt: Sequence[int], seed: int, n: int, vocab_size: int) -> list[int]:
    """The `n` tokens that a sound engine gives after `prompt`, whatever its batches, blocks and moves."""
    stream: list[int] = []
    value = digest = 0
    for position in range(len(prompt) + n - 1):
        token = prompt[position] if position < len(prompt) else stream[-1]
        digest = _digest(digest, token)
        value += (2 * position + 1) * (token + digest)
        if position >= len(prompt) - 1:
            stream.append(_draw(value, seed, vocab_size))
    return stream


def _mix(x: int) -> int:
    """A 64-bit integer hash (the finaliser of splitmix64)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _digest(previous: int, token: int) -> int:
    return _mix(previous + (token + 1) * _GOLDEN)


def _draw(value: int, seed: int, vocab_size: int) -> int:
    return _mix(_mix(value) ^ seed) % vocab_size


class _Line(NamedTuple):
    """A row as it was launched."""

    row: Row
    tokens: list[int]  # to compute; empty: the one that the step before has drawn
    table: list[int]


class _Ticket(NamedTuple):
    """A step under way. The device computes it when the one before is done, and ends at `end` (seconds)."""

    plan: StepPlan
    lines: list[_Line]
    end: float


class HashRunner:
    """The pool is [blocks, 1, 2, block_size, 1, 1] of uint64. `step_seconds` slows each step to a model's pace.

    It overlaps steps as a GPU does: a step launched early reads and writes the pool as late as it may.
    """

    device = "hash"
    eos_token_ids: tuple[int, ...] = ()

    def __init__(
        self,
        vocab_size: int,
        max_model_len: int,
        block_size: int,
        *,
        step_seconds: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._block_size = block_size
        self._step_seconds = step_seconds
        self._sleep = sleep
        self._clock = clock
        self._weights = 2 * np.arange(max_model_len, dtype=np.uint64) + 1  # odd: no change is multiplied away
        self._kv: npt.NDArray[np.uint64]
        self._last: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # the token drawn last
        self._free_at = 0.0  # when the device has done what is launched, seconds

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        return PoolSpec(num_blocks, 1, self._block_size, 1, 1, "uint64", 8)

    def load(self, pool: memoryview) -> None:
        self._kv = np.frombuffer(pool, np.uint64).reshape(-1, 2, self._block_size)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> _Ticket:
        """See `Overlapping`."""
        lines = [
            _Line(row, row.request.tokens[row.start : row.start + row.count], row.request.block_table)
            for row in plan.rows
        ]
        self._free_at = max(self._free_at, self._clock()) + self._step_seconds
        return _Ticket(plan, lines, self._free_at)

    def collect(self, ticket: _Ticket) -> StepResult:
        """See `Overlapping`."""
        if self._step_seconds > 0:
            self._sleep(max(0.0, ticket.end - self._clock()))
        for line in ticket.lines:
            self._write(line)
        tokens = [self._next_token(line) for line in ticket.lines if line.row.sample]
        self._last.update(zip((row.request for row in ticket.plan.rows if row.sample), tokens, strict=True))
        return StepResult(tokens, certain(ticket.plan, tokens))

    def stands_alone(self, plan: StepPlan) -> bool:
        """See `Overlapping`."""
        return False

    def _write(self, line: _Line) -> None:
        """Compute the KV of the row's tokens from the slot before them."""
        row, size = line.row, self._block_size
        digest = 0
        if row.start:
            digest = int(self._kv[line.table[(row.start - 1) // size], 1, (row.start - 1) % size])
        for position, token in enumerate(line.tokens or [self._last[row.request]], row.start):
            digest = _digest(digest, token)
            self._kv[line.table[position // size], :, position % size] = token, digest

    def _next_token(self, line: _Line) -> int:
        length = line.row.start + line.row.count
        blocks = self._kv[line.table[: -(-length // self._block_size)]]
        slots = blocks.sum(axis=1).reshape(-1)[:length]
        value = int(slots @ self._weights[:length])
        return _draw(value, line.row.request.sampling.seed, self.vocab_size)
