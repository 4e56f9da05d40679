"""Runner that proves by its output that its KV is correct: each token is a hash of the sequence's whole KV.

It is like a model with one layer. The KV of position i is its token id (K) and a digest of tokens 0..i (V). Sampling
the token at position n reads the KV of all n positions through the block table, as attention does. So a block that is
lost, stale, misplaced or wrongly copied changes all later tokens. `expected_stream` returns the correct tokens.
Under a grammar the hash chooses among the tokens that the mask allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from daemon.engine.fake.masked import allowed_tokens
from daemon.engine.fake.stub import certain_logprobs, records_of
from daemon.engine.request import Request
from daemon.engine.runner import PoolSpec, Row, StepPlan, StepResult, TokenMasks
from daemon.splitmix import GOLDEN_GAMMA, mix64


def expected_stream(
    prompt: Sequence[int],
    seed: int,
    n: int,
    vocab_size: int,
    allowed: Callable[[Sequence[int]], Sequence[int]] | None = None,
) -> list[int]:
    """Return the `n` tokens that a correct engine samples after `prompt`, with any batches, blocks and migrations.

    `allowed` returns the tokens, ascending, that may follow an output; None: all.
    """
    stream: list[int] = []
    value = digest = 0
    for position in range(len(prompt) + n - 1):
        token = prompt[position] if position < len(prompt) else stream[-1]
        digest = _digest(digest, token)
        value += (2 * position + 1) * (token + digest)
        if position >= len(prompt) - 1:
            ids = range(vocab_size) if allowed is None else allowed(stream)
            stream.append(ids[_sample(value, seed, len(ids))])
    return stream


def expected_prompt_logprobs(prompt: Sequence[int]) -> list[float]:
    """Return the logprobs of the tokens of `prompt` after the first, as a correct engine gives them by its KV."""
    found, digest = [], 0
    for token in prompt[:-1]:
        digest = _digest(digest, token)
        found.append(_logprob(digest))
    return found


def _logprob(digest: int) -> float:
    return -(digest % 1024) / 64  # exact in float32


def _digest(previous: int, token: int) -> int:
    return mix64(previous + (token + 1) * GOLDEN_GAMMA)


def _sample(value: int, seed: int, vocab_size: int) -> int:
    return mix64(mix64(value) ^ seed) % vocab_size


class _LaunchedRow(NamedTuple):
    """A row with the tokens and block table that it was launched with."""

    row: Row
    tokens: list[int]  # to compute; empty: the one token that the previous step samples
    table: list[int]


class _Ticket(NamedTuple):
    """A step in flight. The device computes it after the previous step, until the time `end` (seconds)."""

    plan: StepPlan
    rows: list[_LaunchedRow]
    end: float


class HashRunner:
    """Samples hashes of the KV. The pool is [blocks, 1, 2, block_size, 1, 1] of uint64.

    `step_seconds` is the duration of a step. Steps overlap as on a GPU: a step that is launched early reads and
    writes the pool only when it is collected.
    """

    device = "hash"
    arithmetic = ""
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
        self._weights = 2 * np.arange(max_model_len, dtype=np.uint64) + 1  # odd: a factor of 2 could hide a change
        self._kv: npt.NDArray[np.uint64]
        self._last: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # the token sampled last
        self._free_at = 0.0  # time (seconds) at which the device has completed the launched steps

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        return PoolSpec(num_blocks, 1, self._block_size, 1, 1, "uint64", 8)

    def load(self, pool: memoryview) -> None:
        self._kv = np.frombuffer(pool, np.uint64).reshape(-1, 2, self._block_size)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> _Ticket:
        """See `Overlapping`."""
        rows = [
            _LaunchedRow(row, row.request.tokens[row.start : row.start + row.count], row.request.block_table)
            for row in plan.rows
        ]
        self._free_at = max(self._free_at, self._clock()) + self._step_seconds
        return _Ticket(plan, rows, self._free_at)

    def collect(self, ticket: _Ticket) -> StepResult:
        """See `Overlapping`."""
        if self._step_seconds > 0:
            self._sleep(max(0.0, ticket.end - self._clock()))
        for launched in ticket.rows:
            self._write(launched)
        scored = self._prompt_logprobs(ticket) if any(row.scored for row in ticket.plan.rows) else None
        masks = ticket.plan.masks
        tokens = [self._next_token(launched, masks) for launched in ticket.rows if launched.row.sample]
        self._last.update(zip((row.request for row in ticket.plan.rows if row.sample), tokens, strict=True))
        return StepResult(tokens, certain_logprobs(ticket.plan, tokens), prompt_logprobs=scored)

    def blocks_overlap(self, plan: StepPlan) -> bool:
        """See `Overlapping`: the mask after a token cannot be computed before the token."""
        return plan.masks is not None

    def _write(self, launched: _LaunchedRow) -> None:
        """Compute the KV of the row's tokens from the KV of the position before them."""
        row, size = launched.row, self._block_size
        digest = 0
        if row.start:
            digest = int(self._kv[launched.table[(row.start - 1) // size], 1, (row.start - 1) % size])
        for position, token in enumerate(launched.tokens or [self._last[row.request]], row.start):
            digest = _digest(digest, token)
            self._kv[launched.table[position // size], :, position % size] = token, digest

    def _prompt_logprobs(self, ticket: _Ticket) -> dict[int, bytes]:
        """Score by the digest of each scored position, as it is in the pool."""
        size = self._block_size
        digests = [
            int(self._kv[launched.table[position // size], 1, position % size])
            for launched in ticket.rows
            for position in launched.row.scored
        ]
        logprobs = np.array([_logprob(digest) for digest in digests], np.float32)
        return records_of(ticket.plan, logprobs)

    def _next_token(self, launched: _LaunchedRow, masks: TokenMasks | None) -> int:
        length = launched.row.start + launched.row.count
        blocks = self._kv[launched.table[: -(-length // self._block_size)]]
        kv = blocks.sum(axis=1).reshape(-1)[:length]
        value = int(kv @ self._weights[:length])
        request = launched.row.request
        if not request.sampling.grammar:
            return _sample(value, request.sampling.seed, self.vocab_size)
        ids = allowed_tokens(request, masks)
        return ids if isinstance(ids, int) else int(ids[_sample(value, request.sampling.seed, len(ids))])
