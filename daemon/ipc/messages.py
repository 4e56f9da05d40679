"""Every message that crosses a process boundary. msgpack, typed, never pickle.

A message travels in a ring record whose header names the incarnations of sender and receiver
(`control.ring`), so no message repeats them. Step batches are columnar: one list a field.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

from daemon.enums import MigrationChoice, MigrationMode, MigrationReason

Struct = msgspec.Struct


class Finish(IntEnum):
    """Why a request ended; NONE while it runs."""

    NONE = 0
    STOP = 1  # end-of-sequence token, stop token or stop string
    LENGTH = 2  # max_tokens or the model's context
    CANCELLED = 3  # by the client, an operator or the deadline
    ERROR = 4  # the engine could not go on; see the log


class EngineIncarnation(NamedTuple):
    """One incarnation of one engine: the pair names the process, not only its place."""

    engine: int
    incarnation: int


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


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural-log probabilities at one position, of the distribution before temperature and masks."""

    logprob: float  # of the chosen token
    top_ids: list[int]
    top_logprobs: list[float]  # descending


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


class OwnedRequests(Struct, tag=3, array_like=True, frozen=True):
    """All that the (restarted) frontend owns at this engine; whatever it omits is dropped."""

    rids: list[int]
    epochs: list[int]


class Grant(Struct, tag=4, array_like=True, frozen=True):
    """Whoever holds `rid` frozen or pending at `epoch` is its owner, at `new_epoch`: run it."""

    rid: int
    epoch: int
    new_epoch: int


class Release(Struct, tag=5, array_like=True, frozen=True):
    """`rid` is somebody else's, or ended: free everything of it at `epoch` or older."""

    rid: int
    epoch: int


class Reprioritise(Struct, tag=6, array_like=True, frozen=True):
    """`rid`, held at `epoch`, has this priority from now on."""

    rid: int
    epoch: int
    priority: int


ToEngine = Start | Cancel | OwnedRequests | Grant | Release | Reprioritise


# -- coordinator -> engine -----------------------------------------------------------------------


class MigrateTo(Struct, tag=1, array_like=True, frozen=True):
    """Move requests to another engine, one after another, until the lease ends; sent anew to renew it."""

    engine: int
    lease: float  # CLOCK_MONOTONIC seconds
    rid: int = 0  # this request and no other; 0: the llumlet chooses
    choice: str = MigrationChoice.SHORTEST  # among requests of one class
    drain: bool = False  # the engine is to become empty: urgent and waiting requests leave as well
    how: str = MigrationMode.LIVE  # of one request
    reason: str = MigrationReason.OPERATOR  # for the record


ToLlumlet = MigrateTo


# -- engine -> engine ----------------------------------------------------------------------------
# `move` numbers the migrations of one source incarnation; an answer names the move it answers.


class Reserve(Struct, tag=1, array_like=True, frozen=True):
    """Source: have room for the first `num_tokens` tokens of a request, and (stage 0) a place in the batch."""

    move: int
    rid: int
    epoch: int
    frontend: int
    slot: int  # journal slot of that frontend
    stage: int  # 0: the first; a later one extends what is reserved
    num_tokens: int
    longest: int  # tokens that the request can become
    hashes: list[bytes]  # stage 0: names of the full blocks computed so far; later none


class Reserved(Struct, tag=2, array_like=True, frozen=True):
    """Destination: room for the blocks that follow those it had said before.

    The first `skip` blocks of the request are there already, found by name; `blocks` are ids in the
    destination's pool, which the source may write until it says Handover or Aborted.
    """

    move: int
    rid: int
    epoch: int
    stage: int
    skip: int
    blocks: list[int]


class Declined(Struct, tag=3, array_like=True, frozen=True):
    """Destination: no. What it had reserved before stays reserved until Aborted; what was handed over is free."""

    move: int
    rid: int
    epoch: int
    reason: str


class Aborted(Struct, tag=4, array_like=True, frozen=True):
    """Source: it stays here or is gone; no copy of this move is under way any more."""

    move: int
    rid: int
    epoch: int


class Handover(Struct, tag=5, array_like=True, frozen=True):
    """Source: all KV has arrived, the request is frozen here. Output before `start` is in the journal."""

    move: int
    rid: int
    epoch: int
    num_computed: int  # tokens whose KV is there
    num_cached: int  # prompt tokens that came from a prefix cache
    start: int  # output position of the first of `tokens`
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None  # one a token, or None if the request wants none


ToPeer = Reserve | Reserved | Declined | Aborted | Handover


# -- engine -> frontend ------------------------------------------------------------------------


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


class Takeover(Struct, tag=3, array_like=True, frozen=True):
    """The destination of a migration holds the request, pending, and asks to own it. Carries the output from
    position `start` on that the journal may not hold yet."""

    rid: int
    epoch: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Reclaim(Struct, tag=4, array_like=True, frozen=True):
    """The source of a migration, which froze the request, asks to go on with it. Carries the same output."""

    rid: int
    epoch: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class HandBack(Struct, tag=5, array_like=True, frozen=True):
    """The engine holds nothing of the request at `epoch`: start it anew, elsewhere if possible."""

    rid: int
    epoch: int


ToFrontend = StepOutput | Refused | Takeover | Reclaim | HandBack


# -- coordinator -> frontend -------------------------------------------------------------------


class CancelRequest(Struct, tag=1, array_like=True, frozen=True):
    """An operator cancels a request."""

    rid: int


class SetPriority(Struct, tag=2, array_like=True, frozen=True):
    """An operator gives a request another priority."""

    rid: int
    priority: int


FromCoordinator = CancelRequest | SetPriority

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_llumlet = msgspec.msgpack.Decoder(ToLlumlet).decode
decode_to_peer = msgspec.msgpack.Decoder(ToPeer).decode
decode_to_frontend = msgspec.msgpack.Decoder(ToFrontend).decode
decode_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator).decode
decode_params = msgspec.msgpack.Decoder(RequestParams).decode


# -- boards ------------------------------------------------------------------------------------


class EngineState(IntEnum):
    """What an engine publishes about itself, on its board and in its progress words."""

    STARTING = 0
    LOADING = 1
    SERVING = 2
    DRAINING = 3  # takes nothing new and gives away what it has: by an operator, or at shutdown
    PARKED = 4  # the same, and its process ends once it is empty, until it is woken


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
    high_running: int = 0  # of `running`, those of high priority (below 0)
    high_waiting: int = 0  # of `waiting`
    preempted_waiting: int = 0  # of `waiting`, those that have run before
    incoming: int = 0  # requests it has reserved for; their blocks are in `used_blocks`, they are not in `running`
    outgoing: int = 0  # requests it is copying away, still in `running`
    knee: int = 0  # tokens in a step at which it takes twice its ideal time; 0: not measured
    ideal_tokens: int = 0  # KV up to which a decode step takes nearly its ideal time; 0: not measured
    measured_knee: int = 0  # by this engine alone; `knee` is what engines of its make agree on
    measured_ideal_tokens: int = 0
    make: str = ""  # device and model: engines of one make take equally long for a step
    kv_format: str = ""  # shape and dtype of a KV block; blocks move between equal ones only
    pool_handle: bytes = b""  # how to open a KV pool in a GPU's memory: see kvpool/cuda_pools.py


class FrontendFacts(Struct, array_like=True, frozen=True):
    """Raw facts of one frontend, published at each dispatch."""

    incarnation: int
    submitted: list[Demand]  # one an engine
    active: int  # unfinished requests
    ready: bool


decode_engine_facts = msgspec.msgpack.Decoder(EngineFacts).decode
decode_frontend_facts = msgspec.msgpack.Decoder(FrontendFacts).decode
