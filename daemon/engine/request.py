"""A request as its engine sees it: tokens, progress, blocks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.ipc.messages import Finish, RequestParams, SamplingParams


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One choice of one client request.

    `tokens` is the prompt followed by the output. `num_computed` of them have their KV in the
    blocks of `block_table` (token i lies in block ``block_table[i // block_size]``); after prefill it trails
    `len(tokens)` by one, the token to feed next.
    """

    rid: int
    epoch: int
    frontend: int
    params: RequestParams
    tokens: list[int]
    prompt_len: int
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, computed lazily
    finish: Finish = Finish.NONE
    preemptions: int = 0
    admitted: float = -1.0  # first time it entered the batch
    slot: int = -1  # journal slot of its frontend
    num_inflight_tokens: int = 0  # tokens whose KV steps in flight compute, after those of `num_computed`
    num_sampling: bool = False  # a step in flight draws the token after those known
    held: bool = False  # left out of further steps, so that none in flight contains it soon

    @property
    def sampling(self) -> SamplingParams:
        return self.params.sampling

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def length(self) -> int:
        """Tokens known or being drawn."""
        return len(self.tokens) + self.num_sampling

    @property
    def pending(self) -> int:
        """Tokens whose KV is neither computed nor on its way; 1 for a decoding request."""
        return self.length - self.num_computed - self.num_inflight_tokens

    @property
    def in_flight(self) -> bool:
        """A step that is launched and not folded yet writes its KV."""
        return self.num_inflight_tokens > 0

    @property
    def last_position(self) -> int:
        """Longest sequence this request can become, in tokens."""
        return self.prompt_len + self.sampling.max_tokens
