"""What computes a step. The worker drives any of: the model on CPU or CUDA, the stub, the hash engine.

The scheduler (pure) makes a `StepPlan`; a `Runner` computes it and says which tokens came out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from daemon.engine.request import Request
from daemon.ipc.messages import TokenLogprobs


class Row(NamedTuple):
    """Compute ``request.tokens[start : start + count]``; all earlier KV is in its blocks, which also have room
    for these. `sample`: the chunk reaches the last token, so the next one is drawn from its logits.

    Where ``start == len(request.tokens)`` the one token to compute is what the step in flight draws for it.
    """

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here
    sample: bool
    preemptions: int = 0  # the request's preemptions when this was planned: after another one the row is void


@dataclass(slots=True)
class StepPlan:
    """One step: decode rows (count 1) first, then prefill chunks."""

    rows: list[Row]
    num_decodes: int  # rows[:num_decodes] are decodes
    preempted: list[Request] = field(default_factory=list)
    number: int = 0  # plans of a scheduler, counted from 1

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


NO_TOKEN = -1  # nothing could be drawn: the request ends with an error, its batch goes on


class StepResult(NamedTuple):
    """`tokens[i]` is the token drawn for the i-th row with `sample`, or NO_TOKEN; logprobs likewise.

    `dropped`: indices of plan rows that were not computed for want of memory. Their KV does not exist, so their
    requests must end and none of their blocks may be registered; where they sample, the token is NO_TOKEN.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    dropped: tuple[int, ...] = ()


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


class Overlapping(Protocol):
    """A runner that can have the next step under way before the last one's tokens are known.

    Steps are computed in the order in which they are launched, each over what the ones before have written. Two
    at most are under way, and they are collected in turn.
    """

    def launch(self, plan: StepPlan) -> Any:
        """Begin a step; the ticket is for `collect`. What is to be read of the plan's requests is read now, but
        for a token that the step before draws."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for the step's end."""
        ...

    def stands_alone(self, plan: StepPlan) -> bool:
        """Whether the step must be collected before the next one is planned: its tokens are drawn on the host."""
        ...


class Runner(Protocol):
    """Computes steps over one KV pool. Not thread-safe; every call comes from the worker's loop.

    Life: construct (reads the model's config, no weights) -> `pool_spec` -> `load` -> `execute`*.
    """

    device: str  # what it computes on, by name: engines on equal ones share what they measure
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


class DeviceRunner(Runner, Overlapping, Protocol):
    """A runner that keeps its KV pool in its device's own memory; `execute` is `launch` and `collect`."""

    num_blocks: int  # of the pool, the dummy among them; known after `load`

    @property
    def pool_memory(self) -> Any:
        """The pool's bytes as one tensor on the device, an allocation of its own; after `load`."""
        ...

    def load(self, pool: memoryview | None = None) -> None:
        """As `Runner.load`; without `pool` the runner measures what is free, and allocates the pool itself."""
        ...
