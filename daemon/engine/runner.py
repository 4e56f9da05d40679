"""The interface between the worker and a backend: the model on CPU or CUDA, the stub, the hash engine.

The scheduler (pure) makes a `StepPlan`. A `Runner` computes it and returns the sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from daemon.engine.request import Request
from daemon.ipc.messages import TokenLogprobs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_SCORED = range(0)


class Row(NamedTuple):
    """One request's part of a step: compute the KV of ``request.tokens[start : start + count]``.

    The request's blocks hold all earlier KV and have space for these tokens. `sample`: the chunk reaches the last
    token, so the runner samples the next token from its logits.

    If ``start == len(request.tokens)``, the one token to compute is the token that the step in flight samples for
    this request.

    `scored`: positions in the prompt. The logits of each give the logprobs of the prompt's next token.
    """

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which is not used here
    sample: bool
    preemptions: int = 0  # `request.preemptions` at planning; after another preemption the row is void
    scored: range = NOT_SCORED


class TokenMasks(Protocol):
    """The masks of the rows of one step whose requests have a grammar."""

    def of(self, request: Request) -> NDArray[np.int32] | int:
        """Return the mask of a request: bit t % 32 of word t // 32 is set if token t may be sampled.

        Otherwise return what stands for its token: NO_TOKEN, NOT_YET or NOT_ONE. May wait a little. Call it once the
        logits are there.
        """
        ...

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for all masks; return True if they are there."""
        ...


@dataclass(slots=True)
class StepPlan:
    """One step: the decode rows (count 1), then the prefill chunks. `masks`: None if no sampled row has a grammar."""

    rows: list[Row]
    num_decodes: int  # rows[:num_decodes] are decodes
    preempted: list[Request] = field(default_factory=list)
    number: int = 0  # of the plan, counted from 1 by its scheduler
    masks: TokenMasks | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the step computes."""
        return sum(row.count for row in self.rows)


NO_TOKEN = -1  # no token could be sampled: the request ends with an error, the batch continues
NOT_YET = -2  # the row's mask is late: no token was sampled, and the row's last token is computed again
NOT_ONE = -3  # the grammar of the request allows no token: the request ends with DEAD_END


class StepResult(NamedTuple):
    """`tokens[i]` is the token sampled for the i-th row with `sample`, or stands for none; `logprobs` has its order.

    `dropped`: indices of the plan's rows that were not computed because memory ran out. Their KV does not exist, so
    their requests must end and their blocks must not enter the prefix cache. If such a row samples, its token is
    NO_TOKEN.

    `prompt_logprobs`: the records of each computed row with `scored`, by its index in the plan.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    dropped: tuple[int, ...] = ()
    prompt_logprobs: dict[int, bytes] | None = None


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
        """Size of one block."""
        return self.layers * 2 * self.block_size * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def nbytes(self) -> int:
        """Size of the pool in bytes."""
        return self.num_blocks * self.block_bytes


class Unavailable(Exception):
    """The engine cannot start now for lack of something that may be there later, such as memory.

    The message says what is missing. The supervisor starts the engine again, with back-off.
    """


class RunnerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a runner that computes a model; `build_runner` makes them from `Config`."""

    load_format: str = "auto"  # "auto": read the checkpoint; "dummy": random weights
    dtype: str = "auto"  # "auto", "bf16" or "fp32"
    kv_dtype: str = "auto"  # CUDA only: "auto" (as `dtype`) or "fp8" (e4m3 with scale 1)
    deterministic: bool = False  # a token's bits do not depend on its batch; CPU only
    threads: int = 1  # CPU only
    block_size: int = 16  # tokens of a KV block
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    kv_memory: int = 0  # CUDA only: bytes of the KV pool; 0: all memory that is free within `memory_share`
    memory_share: float = 0.9  # CUDA only: share of the device's memory that this engine may use


class Overlapping(Protocol):
    """A runner that can launch the next step before the tokens of the last one are known.

    Steps are computed in launch order. Each step reads what the earlier steps wrote. At most two steps are in
    flight, and they are collected in launch order.
    """

    def launch(self, plan: StepPlan) -> Any:
        """Begin a step and return a ticket for `collect`.

        The runner reads the plan's requests now, except for a token that the step before it samples.
        """
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for the end of the step and return its result."""
        ...

    def blocks_overlap(self, plan: StepPlan) -> bool:
        """Return True if the step must be collected before the next one is planned: the host samples its tokens."""
        ...


class Runner(Protocol):
    """Computes steps over one KV pool. Not thread-safe; every call comes from the worker's loop.

    Order of calls: constructor (reads the model's config, no weights) -> `pool_spec` -> `load` -> `execute`*.
    """

    device: str  # name of the hardware: engines with the same name share their measurements
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int

    @property
    def arithmetic(self) -> str:
        """The type of the products, known after `load`. An engine with another one cannot use the KV."""
        ...

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        """Return the shape of a pool of `num_blocks` blocks. Block 0 is a dummy that no request holds."""
        ...

    def load(self, pool: memoryview) -> None:
        """Load the weights, use `pool` (writable, pool_spec().nbytes long) as KV pool, and warm up every kernel."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Write the KV of the plan's rows into their blocks and sample a token for each row with `sample`.

        Must not change `plan` or its requests: the scheduler applies the result to them.
        """
        ...


class DeviceRunner(Runner, Overlapping, Protocol):
    """A runner with its KV pool in the device's memory; `execute` is `launch` followed by `collect`."""

    num_blocks: int  # of the pool, including the dummy; known after `load`

    @property
    def pool_memory(self) -> Any:
        """The pool's bytes as one tensor on the device, in a separate allocation. Valid after `load`."""
        ...

    def load(self, pool: memoryview | None = None) -> None:
        """Load as `Runner.load` does. Without `pool` the runner measures the free memory and allocates the pool."""
        ...
