"""The messages between processes and the facts on boards: typed, encoded as msgpack, never pickle.

The header of the ring record that carries a message contains the incarnations of sender and receiver (`ipc.ring`), so
no message repeats them. Batches of a step are columnar: one list per field.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

from daemon.enums import MigrationChoice, MigrationMode, MigrationReason
from daemon.ipc.prompt_logprobs import PromptLogprobs

Struct = msgspec.Struct


class Finish(IntEnum):
    """Why a request has ended; NONE while it has not."""

    NONE = 0
    STOP = 1  # end-of-sequence token, stop token or stop string
    LENGTH = 2  # max_tokens or the model's context
    CANCELLED = 3  # by the client or an operator
    ERROR = 4  # the engine could not continue; see the log
    DEADLINE = 5  # `request_deadline` has passed
    DEAD_END = 6  # its grammar allows no token of the model


class EngineIncarnation(NamedTuple):
    """One incarnation of one engine: it names one process, where the index alone names all its incarnations."""

    engine: int
    incarnation: int


class SamplingParams(Struct, array_like=True, frozen=True):
    """The parameters that determine the next token. The journal contains them, so a resumed request keeps them.

    `seed` is always set: the user's, or a random one from admission; choice i of n uses `choice_seed`.
    """

    max_tokens: int  # 0: only the prompt is computed
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
    logprobs: int = -1  # -1: none; 0: of the chosen token; k: also of the k most likely tokens
    grammar: str = ""  # that the output matches, in llguidance's form; "": none
    prompt_logprobs: int = -1  # the same of each token of the prompt but the first
    allowed_token_ids: tuple[int, ...] = ()  # only these may be sampled; (): all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences that the output may not contain

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class RequestParams(Struct, array_like=True, frozen=True):
    """What the journal contains of a request besides its tokens."""

    sampling: SamplingParams
    arrival: float  # CLOCK_MONOTONIC seconds at which the frontend accepted it
    priority: int = 0  # scheduling class; lower is more urgent, as in vLLM
    cache_salt: bytes = b""  # requests share prefix blocks only with the same salt
    label: str = ""  # public id, for operators
    x_request_id: str = ""  # that its client has sent, for operators
    client: str = ""  # that it counts for in admission


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural-log probabilities at one position, of the distribution before temperature and masks."""

    logprob: float  # of the chosen token
    top_ids: list[int]
    top_logprobs: list[float]  # descending


# -- frontend -> engine ------------------------------------------------------------------------


class Start(Struct, tag=1, array_like=True, frozen=True):
    """Run this request from its journal slot. Ignored unless `epoch` exceeds the epoch that the engine holds."""

    rid: int
    epoch: int
    slot: int  # journal slot of the sending frontend
    tokens: int  # of the prompt, as counted in `Demand`; the slot may already belong to another request


class Cancel(Struct, tag=2, array_like=True, frozen=True):
    """The client has left or has enough output: free everything of `rid` at `epoch` or older."""

    rid: int
    epoch: int


class OwnedRequests(Struct, tag=3, array_like=True, frozen=True):
    """All requests of the frontend that this engine owns, with an id from `first` to `last`.

    The engine drops every other request with such an id that it runs, and claims again what waits for a decision.
    """

    rids: list[int]
    epochs: list[int]
    accepted: list[int]  # output tokens journaled of each
    priorities: list[int]  # present priority of each
    first: int = 0
    last: int = (1 << 64) - 1


class Grant(Struct, tag=4, array_like=True, frozen=True):
    """The engine that holds `rid` frozen or pending at `epoch` is its owner at `new_epoch`: run it."""

    rid: int
    epoch: int
    new_epoch: int


class Release(Struct, tag=5, array_like=True, frozen=True):
    """Another engine owns `rid`, or it has ended: free everything of it at `epoch` or older."""

    rid: int
    epoch: int


class Reprioritise(Struct, tag=6, array_like=True, frozen=True):
    """Give `rid`, held at `epoch`, this priority."""

    rid: int
    epoch: int
    priority: int


ToEngine = Start | Cancel | OwnedRequests | Grant | Release | Reprioritise


# -- coordinator -> engine -----------------------------------------------------------------------


class MigrateTo(Struct, tag=1, array_like=True, frozen=True):
    """Migrate requests to another engine, one after another, until the lease ends; sent again to renew it."""

    engine: int
    lease: float  # CLOCK_MONOTONIC seconds
    rid: int = 0  # only this request; 0: the llumlet chooses
    choice: str = MigrationChoice.SHORTEST  # among requests of equal priority
    drain: bool = False  # the engine must become empty: urgent and waiting requests migrate, too
    how: str = MigrationMode.LIVE  # for each request
    reason: str = MigrationReason.OPERATOR  # for events and metrics


ToLlumlet = MigrateTo


# -- engine -> engine ----------------------------------------------------------------------------
# `move` numbers the migrations of one source incarnation; an answer names the migration that it answers.


class Reserve(Struct, tag=1, array_like=True, frozen=True):
    """Source: reserve blocks for the first `num_tokens` tokens of a request; the first also a place in its batch."""

    move: int
    rid: int
    epoch: int
    frontend: int
    slot: int  # journal slot of that frontend
    reservation: int  # 0: the first; later ones extend it
    num_tokens: int
    longest: int  # number of tokens that the request can reach
    hashes: list[bytes]  # reservation 0: hashes of the full blocks computed so far; later none
    fingerprint: int = 0  # of the source's KV, see `EngineFacts`


class Reserved(Struct, tag=2, array_like=True, frozen=True):
    """Destination: the blocks that it has reserved, in addition to those in its earlier answers.

    The destination already has the first `skip` blocks of the request, found by their hashes. `blocks` are ids in its
    pool, which the source may write until it sends Handover or Aborted.
    """

    move: int
    rid: int
    epoch: int
    reservation: int
    skip: int
    blocks: list[int]


class Declined(Struct, tag=3, array_like=True, frozen=True):
    """Destination: it refuses. Earlier reservations stay until Aborted; blocks of a request handed over are free."""

    move: int
    rid: int
    epoch: int
    reason: str


class Aborted(Struct, tag=4, array_like=True, frozen=True):
    """Source: the request stays here or has ended; no copy of this migration is in flight any more."""

    move: int
    rid: int
    epoch: int


class Handover(Struct, tag=5, array_like=True, frozen=True):
    """Source: all KV has arrived and the request is frozen here. Output before `start` is in the journal."""

    move: int
    rid: int
    epoch: int
    num_computed: int  # tokens whose KV is at the destination
    num_cached: int  # prompt tokens that came from a prefix cache
    start: int  # output position of the first of `tokens`
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None  # one per token, or None if the request asks for none


ToPeer = Reserve | Reserved | Declined | Aborted | Handover


# -- engine -> frontend ------------------------------------------------------------------------


class StepOutput(Struct, tag=1, array_like=True, frozen=True):
    """All output of one step for one frontend. Row i contains consecutive tokens of request rids[i].

    `starts[i]` is the output position of the row's first token. The row has `counts[i]` tokens; `tokens` contains the
    rows one after another. A row may have no token, and only a finish or logprobs of its prompt.
    """

    rids: list[int]
    epochs: list[int]
    starts: list[int]
    counts: list[int]
    tokens: list[int]
    finishes: list[int]  # Finish
    cached: list[int]  # prompt tokens that came from the prefix cache
    logprobs: list[TokenLogprobs | None] | None = None  # one per token, or None if no row asks for any
    prompt_logprobs: dict[int, PromptLogprobs] | None = None  # by row; None if no row has any


class Refused(Struct, tag=2, array_like=True, frozen=True):
    """The engine can never run this request; `reason` is for the client."""

    rid: int
    epoch: int
    reason: str


class Takeover(Struct, tag=3, array_like=True, frozen=True):
    """The destination of a migration holds the request as pending and asks to own it.

    Carries the output from position `start` on, which may not be in the journal yet.
    """

    rid: int
    epoch: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class Reclaim(Struct, tag=4, array_like=True, frozen=True):
    """The source of a migration, which has frozen the request, asks to continue it. Carries the same output."""

    rid: int
    epoch: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None


class HandBack(Struct, tag=5, array_like=True, frozen=True):
    """The engine holds nothing of the request at `epoch`: dispatch it again, to another engine if possible."""

    rid: int
    epoch: int


ToFrontend = StepOutput | Refused | Takeover | Reclaim | HandBack


# -- coordinator -> frontend -------------------------------------------------------------------


class CancelRequest(Struct, tag=1, array_like=True, frozen=True):
    """An operator cancels a request."""

    rid: int


class SetPriority(Struct, tag=2, array_like=True, frozen=True):
    """An operator changes the priority of a request."""

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
    """The state that an engine publishes on its board and in its progress words."""

    STARTING = 0
    LOADING = 1
    SERVING = 2
    DRAINING = 3  # accepts no new requests and migrates its own away: by an operator, or at shutdown
    PARKED = 4  # the same; when it is empty, its process ends until the engine is woken


class PoolState(IntEnum):
    """Whether an engine can copy KV blocks into another engine's pool."""

    NOT_OPEN = 0  # that engine is not up, or its pool is being opened
    OPEN = 1
    FAILED = 2  # it cannot be opened


class Demand(Struct, array_like=True, frozen=True):
    """Totals between one frontend and one engine since the start of `peer`, an incarnation of the other process.

    The frontend counts what it has submitted, the engine what it has read from the ring. The difference is in flight
    and counts as load.
    """

    peer: int
    requests: int
    tokens: int


class EngineFacts(Struct, array_like=True, frozen=True):
    """Raw facts of one engine, published once per step. The reader computes freeness from them."""

    incarnation: int
    state: int  # EngineState
    step: int
    time: float  # CLOCK_MONOTONIC seconds of publication
    block_size: int
    total_blocks: int
    used_blocks: int  # held by requests; a cached block that can be evicted counts as free
    running: int
    waiting: int
    head_demand_blocks: int  # blocks that the first waiting request needs
    pending_prefill_tokens: int  # not computed yet, of running and waiting requests
    waiting_tokens: int  # of waiting requests only
    max_num_seqs: int
    max_model_len: int
    step_seconds: float  # moving average over steps that computed tokens
    tokens_per_second: float  # emitted, moving average
    consumed: list[Demand]  # one per frontend
    high_running: int = 0  # of `running`, those of high priority (below 0)
    high_waiting: int = 0  # of `waiting`
    preempted_waiting: int = 0  # of `waiting`, those that were preempted
    incoming: int = 0  # requests with a reservation here: counted in `used_blocks`, not in `running`
    outgoing: int = 0  # requests that are migrating away; `running` includes them
    knee: int = 0  # number of tokens at which a step takes twice its ideal time; 0: not measured
    ideal_tokens: int = 0  # tokens of KV up to which a decode step takes nearly its ideal time; 0: not measured
    step_times: bytes = b""  # measured by this engine, see `engine.cost`; `knee` is what its `cost_group` agrees on
    cost_group: str = ""  # device and model: engines of one cost group take equally long for a step
    fingerprint: int = 0  # of all that its KV depends on besides the tokens: blocks move only between equal ones
    weights: int = 0  # identifies its weights; a request ends on the weights it began with
    pool_handle: bytes = b""  # how to open a KV pool in GPU memory: see kvpool/cuda_pools.py
    peer_pools: bytes = b""  # PoolState of each engine's pool, as seen from here; empty: not known


def pool_state(facts: EngineFacts, peer: int) -> PoolState:
    """Return whether the engine can copy into the pool of engine `peer`; OPEN if `facts` do not say."""
    return PoolState(facts.peer_pools[peer]) if peer < len(facts.peer_pools) else PoolState.OPEN


class FrontendFacts(Struct, array_like=True, frozen=True):
    """Raw facts of one frontend, published at each dispatch."""

    incarnation: int
    submitted: list[Demand]  # one per engine
    active: int  # unfinished requests
    ready: bool


decode_engine_facts = msgspec.msgpack.Decoder(EngineFacts).decode
decode_frontend_facts = msgspec.msgpack.Decoder(FrontendFacts).decode
