"""From facts to judgement: virtual usage and freeness (Llumnix, section 4.4), in three variants. Pure.

Virtual usage of an instance, in blocks, is the sum over its requests (Algorithm 1):

- a running request counts what it holds: a shared block once, an evictable one as free, a reservation as used;
- the head of the queue counts its whole demand, which makes instances with free memory elsewhere give it up;
- requests further back count nothing;
- requests of high priority add one headroom an instance, however many they are;
- on an instance that drains, a fake request is infinitely large.

Freeness = (capacity - virtual usage) / batch size, in tokens a request, that is decode steps to go before the
capacity is spent. Engines publish facts alone; what was dispatched and is not in them yet is added here.
A request of priority below 0 is of high priority.

What "nearly its ideal speed" and the knee of an engine's steps are, an engine measures when it starts
(`EngineFacts.ideal_tokens`, which an operator may set instead, and `EngineFacts.knee`); a policy goes by its own
figures only where the facts have none.

`POLICIES` holds the variants: `paper` to the letter, `artifact` as its published experiments ran it, and `llumd`,
the default, which also judges compute: a pool of a million tokens is hardly ever what an engine runs out of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from daemon.enums import Resource
from daemon.ipc.messages import EngineFacts, EngineState

IDEAL_TOKENS = 1600  # KV up to which the paper's 7B model on its A10 decodes at nearly its ideal speed (section 6.4)
SERVING = int(EngineState.SERVING)


class InFlight(NamedTuple):
    """Submitted to an engine by any frontend and not yet taken off a ring."""

    requests: int = 0
    tokens: int = 0


NOTHING = InFlight()


class Term(NamedTuple):
    """One resource of an engine as normal requests see it: without headroom, and whatever its state."""

    resource: Resource
    capacity: float  # tokens
    room: float  # tokens: capacity less usage; below zero, what is lacking
    batch: int  # requests that share the room


class Marks(NamedTuple):
    """Freeness (tokens a request) at which a policy acts, unless an operator sets others."""

    migrate_low: float  # below it an engine gives requests away
    migrate_high: float  # above it an engine takes them
    scale_low: float  # a pool below it wakes an engine
    scale_high: float  # a pool that stays above it without an engine parks that one


# The published 3 blocks a request, and [10, 60] for scaling, with the paper's blocks of 16 tokens.
PUBLISHED = Marks(48.0, 48.0, 160.0, 960.0)


class Policy(ABC):
    """How engines are compared. Freeness: higher is freer; inf when idle, -inf when it may take nothing."""

    name: ClassVar[str]
    marks: ClassVar[Marks]
    sheds_preempted: ClassVar[bool]  # an engine with a preempted request in its queue gives away, never takes

    @abstractmethod
    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NOTHING, high: bool = False) -> float:
        """Freeness as a new request sees it, one of high priority if `high`."""

    @abstractmethod
    def migration(self, facts: EngineFacts) -> float:
        """Freeness by which engines are paired for migration."""

    @abstractmethod
    def terms(self, facts: EngineFacts) -> tuple[Term, ...]:
        """Each resource the policy looks at, always in the same order."""

    def shortest(self, facts: EngineFacts) -> Resource:
        """The resource that `migration` found scarcest."""
        return Resource.MEMORY


@dataclass(frozen=True, slots=True)
class Paper(Policy):
    """Section 4.4 to the letter; one freeness for everything. `ideal_tokens` sets the headroom of an engine that
    has not measured its own."""

    name = "paper"
    marks = PUBLISHED
    sheds_preempted = False

    ideal_tokens: int = IDEAL_TOKENS
    headroom: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NOTHING, high: bool = False) -> float:
        batch = facts.running + facts.incoming + in_flight.requests
        usage = virtual_usage(facts, in_flight, self.ideal_tokens, self.headroom)
        if usage == math.inf:
            return -math.inf
        if not batch and not facts.waiting:
            return math.inf
        return (facts.total_blocks - usage) * facts.block_size / max(1, batch)

    def migration(self, facts: EngineFacts) -> float:
        return self.dispatch(facts)

    def terms(self, facts: EngineFacts) -> tuple[Term, ...]:
        room = facts.total_blocks - facts.used_blocks - facts.head_demand_blocks
        return (_memory(facts, facts.total_blocks, room, facts.running + facts.incoming + bool(facts.waiting)),)


@dataclass(frozen=True, slots=True)
class Artifact(Policy):
    """What the published experiments ran. It differs from the paper in that

    - the whole queue's demand counts, and a hundredth of the blocks is kept free;
    - queued requests count in the batch: all of them in dispatch, one in migration;
    - the headroom is charged once if there is any request of high priority, queued or running; in dispatch a
      request of high priority sees it charged to the instances that hold none, so that such requests gather;
    - draining is a lack of 1000 blocks, not of infinitely many;
    - an instance with a preempted request in its queue always gives away and never takes.

    Without `defrag`, migration looks at free blocks and running requests alone. `ideal_tokens`: as in `Paper`.
    """

    name = "artifact"
    marks = PUBLISHED
    sheds_preempted = True

    ideal_tokens: int = IDEAL_TOKENS
    headroom: bool = True
    defrag: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NOTHING, high: bool = False) -> float:
        if facts.state != SERVING:
            return -1000.0 * facts.block_size
        charged = self.headroom and holds_high(facts) != high
        batch = facts.running + facts.incoming + facts.waiting + in_flight.requests
        if not batch and not charged:
            return math.inf
        room = self._available(facts) - in_flight.tokens / facts.block_size
        if charged:
            room -= headroom(facts, self.ideal_tokens)
        return room * facts.block_size / max(1, batch)

    def migration(self, facts: EngineFacts) -> float:
        if facts.state != SERVING:
            return -1000.0 * facts.block_size
        running = facts.running + facts.incoming
        if not self.defrag:
            free = facts.total_blocks - facts.used_blocks
            return free * facts.block_size / running if running else math.inf
        batch = running + bool(facts.waiting)
        if not batch:
            return math.inf
        room = self._available(facts)
        if self.headroom and holds_high(facts):
            room -= headroom(facts, self.ideal_tokens)
        return room * facts.block_size / batch

    def terms(self, facts: EngineFacts) -> tuple[Term, ...]:
        batch = facts.running + facts.incoming + bool(facts.waiting)
        return (_memory(facts, facts.total_blocks - facts.total_blocks // 100, self._available(facts), batch),)

    def _available(self, facts: EngineFacts) -> float:
        """Free blocks less watermark and the demand of the whole queue."""
        return facts.total_blocks - facts.used_blocks - facts.total_blocks // 100 - queue_demand(facts)


@dataclass(frozen=True, slots=True)
class Llumd(Policy):
    """The scarcer of memory and compute.

    Compute is put in the form of memory. The knee is the engine's own (not measured: the size of its batch).
    Within a horizon of so many decode steps it computes ``knee * horizon`` tokens before its steps take twice
    their ideal time; of these a running request will use ``horizon`` and a prompt its uncomputed tokens. What
    remains, divided by the batch, is again tokens a request: 0 when the batch stands at the knee, less with
    prompts pending, large when there is little to do.
    Steps longer than `step_target` shorten the horizon in proportion: who misses the pace has less to give
    (below the knee alone: beyond it a shorter horizon would make the lack look smaller).

    Room is divided by the batch, a lack is not: else the longest queue would seem the least short.
    In dispatch the demand of the whole queue counts, in migration (de-fragmentation) that of its head.
    Headroom keeps a request of high priority near its ideal speed, by both resources: its engine keeps KV to
    ``facts.ideal_tokens`` (not measured: an eighth of the pool) and its batch to an eighth of the knee.
    """

    name = "llumd"
    marks = Marks(48.0, 64.0, 48.0, 192.0)  # with only compute short: batches of 0.57, 0.5, 0.57 and 0.25 knees
    sheds_preempted = True

    horizon: int = 64  # decode steps
    step_target: float = 0.05  # seconds
    ideal_share: float = 0.125
    headroom: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NOTHING, high: bool = False) -> float:
        # Written out, for it runs once an engine and request: every call costs.
        if facts.state != SERVING:
            return -math.inf
        requests, tokens = in_flight
        batch = facts.running + facts.waiting + facts.incoming + requests
        charged = self.headroom and (facts.high_running > 0 or facts.high_waiting > 0) is not high
        if not batch and not charged:
            return math.inf
        size = facts.block_size
        queued = facts.waiting_tokens
        head = facts.head_demand_blocks * size
        used: float = facts.used_blocks * size + (queued if queued > head else head) + tokens
        horizon: float = self.horizon
        knee: float = facts.knee or facts.max_num_seqs
        capacity: float = facts.total_blocks * size
        if charged:
            capacity = self._ideal(facts)
            knee *= self.ideal_share
        if batch < knee and facts.step_seconds > self.step_target:
            horizon *= self.step_target / facts.step_seconds
        compute = (knee - batch) * horizon - facts.pending_prefill_tokens - tokens
        memory = capacity - used
        room = memory if memory < compute else compute
        return room / batch if room > 0 and batch else room

    def migration(self, facts: EngineFacts) -> float:
        if facts.state != SERVING:
            return -math.inf
        if not facts.running + facts.waiting + facts.incoming:
            return math.inf
        return min(_share(term) for term in self._terms(facts, self.headroom and holds_high(facts)))

    def terms(self, facts: EngineFacts) -> tuple[Term, ...]:
        return self._terms(facts, False)

    def shortest(self, facts: EngineFacts) -> Resource:
        return min(self._terms(facts, self.headroom and holds_high(facts)), key=_share).resource

    def _terms(self, facts: EngineFacts, charged: bool) -> tuple[Term, Term]:
        """Memory and compute, with the headroom taken from both if it is `charged`."""
        size, running = facts.block_size, facts.running + facts.incoming
        batch = running + facts.waiting
        tokens = self._ideal(facts) if charged else facts.total_blocks * size
        knee = (facts.knee or facts.max_num_seqs) * (self.ideal_share if charged else 1.0)
        pace = min(1.0, self.step_target / max(facts.step_seconds, self.step_target))
        steps = (knee - batch) * self.horizon * (pace if batch < knee else 1.0)
        return (
            Term(
                Resource.MEMORY,
                tokens,
                tokens - (facts.used_blocks + facts.head_demand_blocks) * size,
                running + bool(facts.waiting),
            ),
            Term(Resource.COMPUTE, knee * self.horizon * pace, steps - facts.pending_prefill_tokens, batch),
        )

    def _ideal(self, facts: EngineFacts) -> float:
        """Tokens of KV that the headroom leaves."""
        total = facts.total_blocks * facts.block_size
        return min(facts.ideal_tokens or self.ideal_share * total, total)


LLUMD = Llumd()
POLICIES: dict[str, Llumd | Paper | Artifact] = {p.name: p for p in (LLUMD, Paper(), Artifact())}


def policy_of(name: str, headroom: bool = True) -> Policy:
    """The policy of that name. Without `headroom` high priority orders queues alone, and keeps no engine lightly
    loaded."""
    return replace(POLICIES[name], headroom=headroom)


def virtual_usage(
    facts: EngineFacts, in_flight: InFlight = NOTHING, ideal_tokens: int = IDEAL_TOKENS, charged: bool = True
) -> float:
    """Blocks (Algorithm 1); infinite unless serving. In-flight prompts count in full: they are admitted together.
    `charged`: with the headroom of requests of high priority."""
    if facts.state != SERVING:
        return math.inf
    queued = facts.head_demand_blocks + in_flight.tokens / facts.block_size
    reserved = headroom(facts, ideal_tokens) if charged and facts.high_running else 0.0
    return facts.used_blocks + queued + reserved


def headroom(facts: EngineFacts, ideal_tokens: float) -> float:
    """Blocks beyond those with which a request of high priority still decodes at nearly its ideal speed: as the
    engine has measured it, else `ideal_tokens`."""
    return max(0.0, facts.total_blocks - (facts.ideal_tokens or ideal_tokens) / facts.block_size)


def holds_high(facts: EngineFacts) -> bool:
    """Whether a request of high priority runs or waits there."""
    return facts.high_running > 0 or facts.high_waiting > 0


def queue_demand(facts: EngineFacts) -> float:
    """Blocks of all waiting requests; short of the truth by at most one a request, for each rounds up."""
    return max(facts.head_demand_blocks, facts.waiting_tokens / facts.block_size)


def _memory(facts: EngineFacts, capacity: float, room: float, batch: int) -> Term:
    """A term from blocks."""
    return Term(Resource.MEMORY, capacity * facts.block_size, room * facts.block_size, batch)


def _share(term: Term) -> float:
    """Room a request, or the whole lack."""
    return term.room / term.batch if term.room > 0 and term.batch else term.room
