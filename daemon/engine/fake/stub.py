"""A runner without a model: any step takes the same time. For measuring everything around the model."""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.engine.runner import PoolSpec, StepPlan, StepResult
from daemon.ipc.messages import TokenLogprobs

# Ids that spell a visible ASCII character in byte-level vocabularies, whether ids are byte values or count
# the printable bytes first (GPT-2's order) or follow three special tokens.
_FIRST, _COUNT = 36, 55


def stub_token(position: int, vocab_size: int) -> int:
    """The token that the stub draws at `position` of a sequence, whatever stands before it."""
    return (_FIRST + position % _COUNT) % vocab_size


def certain(plan: StepPlan, tokens: list[int]) -> list[TokenLogprobs | None] | None:
    """Logprobs of tokens that could not have been others (probability 1), for the rows that ask."""
    wanted = [row.request.sampling.logprobs for row in plan.rows if row.sample]
    if max(wanted, default=-1) < 0:
        return None
    return [
        TokenLogprobs(0.0, [token][:top], [0.0][:top]) if top >= 0 else None
        for token, top in zip(tokens, wanted, strict=True)
    ]


class StubRunner:
    """Each step sleeps `step_seconds` and draws `stub_token`s; the KV pool stays untouched."""

    device = "stub"
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
        """Nothing to load."""

    def execute(self, plan: StepPlan) -> StepResult:
        if self._step_seconds > 0:
            self._sleep(self._step_seconds)
        tokens = [stub_token(row.start + row.count, self.vocab_size) for row in plan.rows if row.sample]
        return StepResult(tokens, certain(plan, tokens))
