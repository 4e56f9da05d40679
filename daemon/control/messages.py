"""Every message that crosses a process boundary. msgpack, typed, never pickle.

A message travels in a ring record whose header names the incarnations of sender and receiver
(`control.ring`), so no message repeats them. Step batches are columnar: one list a field.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

Struct = msgspec.Struct


class Finish(IntEnum):
    """Why a request ended; NONE while it runs."""

    NONE = 0
    STOP = 1  # end-of-sequence token, stop token or stop string
    LENGTH = 2  # max_tokens or the model's context
    CANCELLED = 3  # by the client, an operator or the deadline
    ERROR = 4  # the engine could not go on; see the log


class SamplingParams(Struct, array_like=True, frozen=True):
    """What decides the next token. Travels in the journal, so a resumed request keeps it.

    `seed` is always set: the user's, or one drawn at admission; choice i of n uses `choice_seed`.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1  # -1: none; 0: of the chosen token; k: and of the k most likely

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class RequestParams(Struct, array_like=True, frozen=True):
    """The journal's record of a request beside its tokens."""

    sampling: SamplingParams
    arrival: float  # seconds, CLOCK_MONOTONIC, when the frontend took it
    priority: int = 0  # scheduling class; lower goes first (vLLM's convention)
    cache_salt: bytes = b""  # requests share prefix blocks only within one salt
    label: str = ""  # public id, for operators


# -- frontend -> engine ------------------------------------------------------------------------


class Start(Struct, tag=1, array_like=True, frozen=True):
    """Run this request from what its journal slot holds. Ignored unless `epoch` is above the one held."""

    rid: int
    epoch: int
    slot: int  # journal slot of the sending frontend
    tokens: int  # of the prompt, as the frontend counts its demand; the slot may be another request's by now


class Cancel(Struct, tag=2, array_like=True, frozen=True):
    """The client is gone or satisfied: free everything of `rid` at `epoch` or older."""

    rid: int
    epoch: int


class Statement(Struct, tag=3, array_like=True, frozen=True):
    """All that the (restarted) frontend owns at this engine; whatever it omits is dropped."""

    rids: list[int]
    epochs: list[int]


ToEngine = Start | Cancel | Statement


# -- engine -> frontend ------------------------------------------------------------------------


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural-log probabilities at one position, of the distribution before temperature and masks."""

    logprob: float  # of the chosen token
    top_ids: list[int]
    top_logprobs: list[float]  # descending


class StepOutput(Struct, tag=1, array_like=True, frozen=True):
    """All that one step gave one frontend. Row i is a run of tokens of request rids[i].

    `starts[i]` is the output position of the row's first token; `counts[i]` tokens of it stand in
    `tokens`, rows after one another. A row may be empty of tokens and only carry a finish.
    """

    rids: list[int]
    epochs: list[int]
    starts: list[int]
    counts: list[int]
    tokens: list[int]
    finishes: list[int]  # Finish
    cached: list[int]  # prompt tokens that came from the prefix cache
    logprobs: list[TokenLogprobs | None] | None = None  # one a token, or None if no row wants any


class Refused(Struct, tag=2, array_like=True, frozen=True):
    """The engine cannot run this request at all; `reason` is for the client."""

    rid: int
    epoch: int
    reason: str


ToFrontend = StepOutput | Refused


# -- coordinator -> frontend -------------------------------------------------------------------


class CancelRequest(Struct, tag=1, array_like=True, frozen=True):
    """An operator cancels a request."""

    rid: int


FromCoordinator = CancelRequest

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_frontend = msgspec.msgpack.Decoder(ToFrontend).decode
decode_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator).decode
decode_params = msgspec.msgpack.Decoder(RequestParams).decode


# -- boards ------------------------------------------------------------------------------------


class EngineState(IntEnum):
    """What an engine publishes about itself, on its board and in its progress words."""

    STARTING = 0
    LOADING = 1
    SERVING = 2
    DRAINING = 3


class Demand(Struct, array_like=True, frozen=True):
    """Totals between one frontend and one engine, counted since `peer` (an incarnation) began.

    The frontend counts what it has submitted, the engine what it has taken off the ring; the
    difference is in flight and counts as load.
    """

    peer: int
    requests: int
    tokens: int


class EngineFacts(Struct, array_like=True, frozen=True):
    """Raw facts of one engine, published once a step. Judgement (freeness) is the reader's."""

    incarnation: int
    state: int  # EngineState
    step: int
    time: float  # CLOCK_MONOTONIC seconds of publication
    block_size: int
    total_blocks: int
    used_blocks: int  # held by a request; an evictable cached block counts as free
    running: int
    waiting: int
    head_demand_blocks: int  # blocks the first waiting request needs
    pending_prefill_tokens: int  # still to compute, of running and waiting requests
    waiting_tokens: int  # of waiting requests alone
    max_num_seqs: int
    max_model_len: int
    step_seconds: float  # moving average of a step with work in it
    tokens_per_second: float  # emitted, moving average
    consumed: list[Demand]  # one a frontend


class FrontendFacts(Struct, array_like=True, frozen=True):
    """Raw facts of one frontend, published at each dispatch."""

    incarnation: int
    submitted: list[Demand]  # one an engine
    active: int  # unfinished requests
    ready: bool


decode_engine_facts = msgspec.msgpack.Decoder(EngineFacts).decode
decode_frontend_facts = msgspec.msgpack.Decoder(FrontendFacts).decode
