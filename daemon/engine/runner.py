"""What computes a step. The worker drives any of: the model on CPU or CUDA, the stub, the hash engine.

The scheduler (pure) makes a `StepPlan`; a `Runner` computes it and says which tokens came out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from daemon.control.messages import TokenLogprobs
from daemon.engine.request import Request


class Row(NamedTuple):
    """Compute ``request.tokens[start : start + count]``; all earlier KV is in its blocks, which also have room
    for these. `sample`: the chunk reaches the last known token, so the next one is drawn from its logits."""

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here
    sample: bool


@dataclass(slots=True)
class StepPlan:
    """One step: decode rows (count 1) first, then prefill chunks."""

    rows: list[Row]
    num_decodes: int  # rows[:num_decodes] are decodes
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


NO_TOKEN = -1  # nothing could be drawn: the request ends with an error, its batch goes on


class StepResult(NamedTuple):
    """`tokens[i]` is the token drawn for the i-th row with `sample`, or NO_TOKEN; logprobs likewise."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


class PoolSpec(NamedTuple):
    """Shape and dtype of a KV pool: [blocks, layers, 2, block_size, kv_heads, head_dim]."""

    num_blocks: int
    layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str  # "float32", "bfloat16", ...
    item_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.block_size * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes


class Runner(Protocol):
    """Computes steps over one KV pool. Not thread-safe; every call comes from the worker's loop.

    Life: construct (reads the model's config, no weights) -> `pool_spec` -> `load` -> `execute`*.
    """

    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        """Shape of a pool of `num_blocks` blocks; block 0 is a dummy that no request holds."""
        ...

    def load(self, pool: memoryview) -> None:
        """Load weights and adopt `pool` (writable, pool_spec().nbytes long). Warms up every kernel."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Write the KV of the plan's rows into their blocks and draw a token for each row that samples.

        Must not change `plan` or its requests: the scheduler folds the result.
        """
        ...
