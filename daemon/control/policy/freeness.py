"""Virtual usage and freeness (Llumnix, section 4.4), computed from facts, in three variants. Pure.

Virtual usage of an instance, in blocks, is the sum over its requests (Algorithm 1):

- a running request counts the blocks that it holds: a shared block once, an evictable one as free, a reservation as
  used;
- the request at the head of the queue counts its whole demand, so that running requests are migrated away to make
  room for it (de-fragmentation);
- requests further back in the queue count nothing;
- requests of high priority add one headroom an instance, however many they are;
- on a draining instance, a fake request is infinitely large.

Freeness = (capacity - virtual usage) / batch size, in tokens a request: the number of decode steps until the
capacity is used up. Engines publish facts alone; requests that were dispatched and are not in the facts yet are
added here. A request of priority below 0 is of high priority.

An engine measures at its start what "nearly its ideal speed" means and where the knee of its step time lies
(`EngineFacts.ideal_tokens`, which an operator may set instead, and `EngineFacts.knee`). A policy uses its own
figures only if the facts have none.

`POLICIES` holds the variants: `paper` follows the paper to the letter, `artifact` follows the published experiments,
and `llumd`, the default, also considers compute: with a pool of a million tokens an engine rarely runs out of memory
first.
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
    """Requests and prompt tokens that all frontends have sent to an engine and it has not read from its rings yet."""

    requests: int = 0
    tokens: int = 0


NONE_IN_FLIGHT = InFlight()


class ResourceLoad(NamedTuple):
    """One resource of an engine as normal requests see it: without headroom, and in any state of the engine."""

    resource: Resource
    capacity: float  # tokens
    room: float  # tokens: capacity minus usage; negative if demand exceeds capacity
    batch: int  # requests that share the room


class Thresholds(NamedTuple):
    """Freeness (tokens a request) at which a policy acts, unless an operator sets other values."""

    migrate_low: float  # an engine below it is a source of migrations
    migrate_high: float  # an engine above it is a destination
    scale_low: float  # an engine is woken if the average is below it
    scale_high: float  # an engine is parked if the average without it would stay above it


# The published 3 blocks a request, and [10, 60] for scaling, with the paper's blocks of 16 tokens.
PUBLISHED = Thresholds(48.0, 48.0, 160.0, 960.0)


class Policy(ABC):
    """How engines are compared. Freeness: higher is freer; inf if idle, -inf if the engine may accept nothing."""

    name: ClassVar[str]
    thresholds: ClassVar[Thresholds]
    sheds_preempted: ClassVar[
        bool
    ]  # an engine with a preempted request in its queue is a source, never a destination

    @abstractmethod
    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NONE_IN_FLIGHT, high: bool = False) -> float:
        """Return the freeness for dispatching a new request, one of high priority if `high`."""

    @abstractmethod
    def migration(self, facts: EngineFacts) -> float:
        """Return the freeness by which engines are paired for migration."""

    @abstractmethod
    def resource_loads(self, facts: EngineFacts) -> tuple[ResourceLoad, ...]:
        """Return each resource that the policy considers, always in the same order."""

    def scarcest_resource(self, facts: EngineFacts) -> Resource:
        """Return the resource that determines `migration`."""
        return Resource.MEMORY


@dataclass(frozen=True, slots=True)
class Paper(Policy):
    """Section 4.4 to the letter; one freeness for dispatch and migration.

    `ideal_tokens` sets the headroom of an engine that has not measured its own.
    """

    name = "paper"
    thresholds = PUBLISHED
    sheds_preempted = False

    ideal_tokens: int = IDEAL_TOKENS
    headroom: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NONE_IN_FLIGHT, high: bool = False) -> float:
        batch = facts.running + facts.incoming + in_flight.requests
        usage = virtual_usage(facts, in_flight, self.ideal_tokens, self.headroom)
        if usage == math.inf:
            return -math.inf
        if not batch and not facts.waiting:
            return math.inf
        return (facts.total_blocks - usage) * facts.block_size / max(1, batch)

    def migration(self, facts: EngineFacts) -> float:
        return self.dispatch(facts)

    def resource_loads(self, facts: EngineFacts) -> tuple[ResourceLoad, ...]:
        room = facts.total_blocks - facts.used_blocks - facts.head_demand_blocks
        batch = facts.running + facts.incoming + bool(facts.waiting)
        return (_memory_load(facts, facts.total_blocks, room, batch),)


@dataclass(frozen=True, slots=True)
class Artifact(Policy):
    """The policy of the published experiments. It differs from the paper as follows:

    - the demand of the whole queue counts, and a hundredth of the blocks is kept free;
    - queued requests count in the batch: all of them in dispatch, one in migration;
    - the headroom is charged once if there is any request of high priority, queued or running; in dispatch a
      request of high priority sees it charged to the instances that hold none, so that such requests gather;
    - draining counts as a deficit of 1000 blocks, not of infinitely many;
    - an instance with a preempted request in its queue is always a source and never a destination.

    Without `defrag`, migration considers free blocks and running requests alone. `ideal_tokens`: as in `Paper`.
    """

    name = "artifact"
    thresholds = PUBLISHED
    sheds_preempted = True

    ideal_tokens: int = IDEAL_TOKENS
    headroom: bool = True
    defrag: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NONE_IN_FLIGHT, high: bool = False) -> float:
        if facts.state != SERVING:
            return -1000.0 * facts.block_size
        charged = self.headroom and holds_high_priority(facts) != high
        batch = facts.running + facts.incoming + facts.waiting + in_flight.requests
        if not batch and not charged:
            return math.inf
        room = self._available_blocks(facts) - in_flight.tokens / facts.block_size
        if charged:
            room -= headroom(facts, self.ideal_tokens)
        return room * facts.block_size / max(1, batch)

    def migration(self, facts: EngineFacts) -> float:
        if facts.state != SERVING:
            return -1000.0 * facts.block_size
        running = facts.running + facts.incoming
        if not self.defrag:
            free_blocks = facts.total_blocks - facts.used_blocks
            return free_blocks * facts.block_size / running if running else math.inf
        batch = running + bool(facts.waiting)
        if not batch:
            return math.inf
        room = self._available_blocks(facts)
        if self.headroom and holds_high_priority(facts):
            room -= headroom(facts, self.ideal_tokens)
        return room * facts.block_size / batch

    def resource_loads(self, facts: EngineFacts) -> tuple[ResourceLoad, ...]:
        batch = facts.running + facts.incoming + bool(facts.waiting)
        capacity = facts.total_blocks - facts.total_blocks // 100
        return (_memory_load(facts, capacity, self._available_blocks(facts), batch),)

    def _available_blocks(self, facts: EngineFacts) -> float:
        """Return the free blocks minus the watermark and the demand of the whole queue."""
        return facts.total_blocks - facts.used_blocks - facts.total_blocks // 100 - queue_demand(facts)


@dataclass(frozen=True, slots=True)
class Llumd(Policy):
    """The scarcer of memory and compute.

    Compute is expressed in tokens, like memory. The knee is the engine's own (not measured: the size of its batch).
    Within a horizon of that many decode steps the engine computes ``knee * horizon`` tokens before its steps take
    twice their ideal time. Of these a running request will use ``horizon``, and a prompt its uncomputed tokens. The
    remainder, divided by the batch, is again tokens a request: 0 if the batch is at the knee, less with prompts
    pending, large if there is little to do.
    Steps longer than `step_target` shorten the horizon in proportion: an engine that misses the target has less room
    (below the knee alone: beyond it a shorter horizon would make the deficit look smaller).

    Room is divided by the batch. Deficits are not: otherwise the longest queue would seem to lack the least.
    In dispatch the demand of the whole queue counts, in migration (de-fragmentation) that of its head.
    Headroom keeps a request of high priority near its ideal speed, by both resources: its engine keeps its KV within
    ``facts.ideal_tokens`` (not measured: an eighth of the pool) and its batch within an eighth of the knee.
    """

    name = "llumd"
    # With only compute scarce: batches of 0.57, 0.5, 0.57 and 0.25 knees.
    thresholds = Thresholds(48.0, 64.0, 48.0, 192.0)
    sheds_preempted = True

    horizon: int = 64  # decode steps
    step_target: float = 0.05  # seconds
    ideal_share: float = 0.125
    headroom: bool = True

    def dispatch(self, facts: EngineFacts, in_flight: InFlight = NONE_IN_FLIGHT, high: bool = False) -> float:
        # Inlined: this runs once for each request and engine, and function calls would dominate its time.
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
            capacity = self._ideal_tokens(facts)
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
        charged = self.headroom and holds_high_priority(facts)
        return min(_room_per_request(load) for load in self._memory_and_compute(facts, charged))

    def resource_loads(self, facts: EngineFacts) -> tuple[ResourceLoad, ...]:
        return self._memory_and_compute(facts, False)

    def scarcest_resource(self, facts: EngineFacts) -> Resource:
        charged = self.headroom and holds_high_priority(facts)
        return min(self._memory_and_compute(facts, charged), key=_room_per_request).resource

    def _memory_and_compute(self, facts: EngineFacts, charged: bool) -> tuple[ResourceLoad, ResourceLoad]:
        """Return memory and compute, both without the headroom if it is `charged`."""
        size, running = facts.block_size, facts.running + facts.incoming
        batch = running + facts.waiting
        tokens = self._ideal_tokens(facts) if charged else facts.total_blocks * size
        knee = (facts.knee or facts.max_num_seqs) * (self.ideal_share if charged else 1.0)
        pace = min(1.0, self.step_target / max(facts.step_seconds, self.step_target))
        compute = (knee - batch) * self.horizon * (pace if batch < knee else 1.0)
        return (
            ResourceLoad(
                Resource.MEMORY,
                tokens,
                tokens - (facts.used_blocks + facts.head_demand_blocks) * size,
                running + bool(facts.waiting),
            ),
            ResourceLoad(Resource.COMPUTE, knee * self.horizon * pace, compute - facts.pending_prefill_tokens, batch),
        )

    def _ideal_tokens(self, facts: EngineFacts) -> float:
        """Return the tokens of KV that the headroom leaves for use."""
        total = facts.total_blocks * facts.block_size
        return min(facts.ideal_tokens or self.ideal_share * total, total)


LLUMD = Llumd()
POLICIES: dict[str, Llumd | Paper | Artifact] = {p.name: p for p in (LLUMD, Paper(), Artifact())}


def policy_of(name: str, headroom: bool = True) -> Policy:
    """Return the policy of that name.

    Without `headroom`, high priority only orders the queues and keeps no engine lightly loaded.
    """
    return replace(POLICIES[name], headroom=headroom)


def virtual_usage(
    facts: EngineFacts, in_flight: InFlight = NONE_IN_FLIGHT, ideal_tokens: int = IDEAL_TOKENS, charged: bool = True
) -> float:
    """Return the virtual usage in blocks (Algorithm 1); infinite unless the engine serves.

    Prompts in flight count in full: they are admitted together. `charged`: with the headroom for high priority.
    """
    if facts.state != SERVING:
        return math.inf
    queued = facts.head_demand_blocks + in_flight.tokens / facts.block_size
    reserved = headroom(facts, ideal_tokens) if charged and facts.high_running else 0.0
    return facts.used_blocks + queued + reserved


def headroom(facts: EngineFacts, ideal_tokens: float) -> float:
    """Return the blocks to keep unused so that a request of high priority decodes at nearly its ideal speed.

    The limit is the one that the engine has measured, otherwise `ideal_tokens`.
    """
    return max(0.0, facts.total_blocks - (facts.ideal_tokens or ideal_tokens) / facts.block_size)


def holds_high_priority(facts: EngineFacts) -> bool:
    """Return True if a request of high priority runs or waits there."""
    return facts.high_running > 0 or facts.high_waiting > 0


def queue_demand(facts: EngineFacts) -> float:
    """Return the demand of all waiting requests in blocks.

    It is too low by at most one block a request, because each request's demand rounds up.
    """
    return max(facts.head_demand_blocks, facts.waiting_tokens / facts.block_size)


def _memory_load(facts: EngineFacts, capacity: float, room: float, batch: int) -> ResourceLoad:
    """Return the memory of an engine, given `capacity` and `room` in blocks."""
    return ResourceLoad(Resource.MEMORY, capacity * facts.block_size, room * facts.block_size, batch)


def _room_per_request(load: ResourceLoad) -> float:
    """Return the room divided by the batch; a deficit is not divided."""
    return load.room / load.batch if load.room > 0 and load.batch else load.room
