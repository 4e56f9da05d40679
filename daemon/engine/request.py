"""A request at its engine: tokens, progress, blocks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.ipc.messages import Finish, RequestParams, SamplingParams


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One choice of one client request.

    `tokens` is the prompt followed by the output. The KV of the first `num_computed` tokens is in the blocks of
    `block_table` (token i is in block ``block_table[i // block_size]``). After prefill, `num_computed` is one less
    than `len(tokens)`: the last token is the next one to feed.
    """

    rid: int
    epoch: int
    frontend: int
    params: RequestParams
    tokens: list[int]
    prompt_len: int
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, computed lazily
    finish: Finish = Finish.NONE
    preemptions: int = 0
    admitted: float = -1.0  # time of the first admission to the batch, seconds; -1: not yet
    slot: int = -1  # journal slot at its frontend
    num_inflight_tokens: int = 0  # tokens after `num_computed` whose KV is computed by steps in flight
    num_sampling: bool = False  # a step in flight samples the token after the known ones
    paused: bool = False  # left out of further plans, so that no step in flight contains it soon
    unready: bool = False  # its next token cannot be sampled yet: the mask of its grammar is being computed
    unscored: int = field(init=False)  # tokens at the prompt's end whose logprobs are wanted and not applied yet

    def __post_init__(self) -> None:
        self.unscored = self.prompt_len - 1 if self.sampling.prompt_logprobs >= 0 else 0

    @property
    def sampling(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.params.sampling

    @property
    def num_output(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_scored(self) -> int:
        """Number of prompt tokens whose logprobs are applied, after the first token. None is wanted if `unscored`
        is 0."""
        return self.prompt_len - 1 - self.unscored

    @property
    def length(self) -> int:
        """Number of tokens that are known or being sampled."""
        return len(self.tokens) + self.num_sampling

    @property
    def pending(self) -> int:
        """Number of tokens whose KV no step has computed or is computing; 1 for a decoding request."""
        return self.length - self.num_computed - self.num_inflight_tokens

    @property
    def in_flight(self) -> bool:
        """True if a step that is launched but not applied yet writes KV of this request."""
        return self.num_inflight_tokens > 0

    @property
    def last_position(self) -> int:
        """Largest length that this request can reach, in tokens."""
        return self.prompt_len + self.sampling.max_tokens
