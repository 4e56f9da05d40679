"""Runner without a model. All steps take the same time. It is for measurements of everything but the model."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from daemon.engine import prompt_scores
from daemon.engine.fake.masked import allowed_tokens
from daemon.engine.prompt_scores import Scores
from daemon.engine.runner import PoolSpec, Row, StepPlan, StepResult
from daemon.ipc.messages import TokenLogprobs
from daemon.ipc.prompt_logprobs import NO_ID

# Ids of visible ASCII characters in byte-level vocabularies: if ids are byte values, if the printable bytes come
# first (GPT-2's order), and if three special tokens come before these.
_FIRST, _COUNT = 36, 55


def stub_token(position: int, vocab_size: int) -> int:
    """Return the token that the stub samples at `position` of every sequence."""
    return (_FIRST + position % _COUNT) % vocab_size


def certain_logprobs(plan: StepPlan, tokens: list[int]) -> list[TokenLogprobs | None] | None:
    """Return logprobs of tokens with probability 1, for the rows that request logprobs; None if no row does."""
    num_logprobs = [row.request.sampling.logprobs for row in plan.rows if row.sample]
    if max(num_logprobs, default=-1) < 0:
        return None
    return [
        TokenLogprobs(0.0, [token][:top], [0.0][:top]) if top >= 0 else None
        for token, top in zip(tokens, num_logprobs, strict=True)
    ]


def certain_prompt_logprobs(plan: StepPlan) -> dict[int, bytes] | None:
    """Return the records of the plan's scored rows, of tokens with probability 1; None if no row is scored."""
    if not any(row.scored for row in plan.rows):
        return None
    num_scored = sum(len(row.scored) for row in plan.rows)
    return records_of(plan, np.zeros(num_scored, np.float32))


def records_of(plan: StepPlan, logprobs: NDArray[np.float32]) -> dict[int, bytes]:
    """Return the records of the plan's scored rows, with these logprobs. The only alternative is the token itself."""
    targets, top = prompt_scores.targets(plan.rows), prompt_scores.num_alternatives(plan.rows)
    ids = np.full((len(targets), top), NO_ID, np.uint32)
    tops = np.zeros((len(targets), top), np.float32)
    ids[:, :1], tops[:, :1] = targets[:, None], logprobs[:, None]
    return prompt_scores.records(plan.rows, Scores(logprobs, np.ones(len(targets), np.uint32), ids, tops))


class StubRunner:
    """Waits `step_seconds` in each step and samples `stub_token`s. Does not use the KV pool.

    Under a grammar it samples the next id that is allowed.
    """

    device = "stub"
    arithmetic = ""
    eos_token_ids: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        step_seconds: float,
        vocab_size: int,
        max_model_len: int,
        block_size: int = 16,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._block_size = block_size
        self._step_seconds = step_seconds
        self._sleep = sleep

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        return PoolSpec(num_blocks, 1, self._block_size, 1, 1, "int8", 1)

    def load(self, pool: memoryview) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Take the time of one step."""
        if self._step_seconds > 0:
            self._sleep(self._step_seconds)

    def execute(self, plan: StepPlan) -> StepResult:
        self.wait()
        tokens = [self._sampled(row, plan) for row in plan.rows if row.sample]
        return StepResult(tokens, certain_logprobs(plan, tokens), prompt_logprobs=certain_prompt_logprobs(plan))

    def _sampled(self, row: Row, plan: StepPlan) -> int:
        token = stub_token(row.start + row.count, self.vocab_size)
        if not row.request.sampling.grammar:
            return token
        ids = allowed_tokens(row.request, plan.masks)
        return ids if isinstance(ids, int) else int(ids[ids.searchsorted(token) % len(ids)])
