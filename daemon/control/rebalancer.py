"""Rebalancing: order the source engine of each pair to migrate requests, once a period.

`policy.rebalancing` decides the pairs; this module writes the orders to the engines' rings. An order is a lease of
two periods: when the coordinator dies, no engine starts a migration after the lease ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from daemon.config import Config
from daemon.control.policy.freeness import policy_of
from daemon.control.policy.rebalancing import Pair, RebalanceRules, explain, pair
from daemon.control.refusal import OTHER_WEIGHTS, Refusal, running_engine
from daemon.enums import MigrationMode, MigrationReason
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Ordered
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineFacts, EngineState, MigrateTo, PoolState, ToLlumlet, encode, pool_state

_LEASE_PERIODS = 2


class Rebalancer:
    """Pairs engines once a period, and orders single migrations for an operator."""

    def __init__(self, fabric: Fabric, config: Config, events: EventWriter) -> None:
        topology = fabric.topology
        self._fabric = fabric
        self._config = config
        self._events = events
        self._rules = RebalanceRules.of(policy_of(config.policy, config.headroom))
        self._rings = [fabric.writer(topology.engine(i)) for i in range(topology.engines)]
        self._pairs: list[Pair] = []

    def cycle(self, facts: Sequence[EngineFacts | None]) -> None:
        """Run one period: renew and make pairs, and send each source its order."""
        made = pair(facts, self._rules, self._pairs)
        held = {(p.source, p.destination) for p in self._pairs}
        # Do not keep pairs without an order: they would keep their engines from pairs of draining engines.
        self._pairs = [p for p in made if self._config.rebalance or p.reason == MigrationReason.DRAINING]
        for each in self._pairs:
            if (each.source, each.destination) not in held:
                detail = f"to engine {each.destination} for {each.reason}"
                self._events.write(Ordered("rebalance", "", each.source, detail, "the scheduler"))
            order = self._order(each.destination, drain=each.reason == MigrationReason.DRAINING, reason=each.reason)
            self._send(facts, each.source, order)

    def explain(self, facts: Sequence[EngineFacts | None]) -> str:
        """Return what the next cycle would do, and why."""
        text = explain(facts, self._rules, self._pairs)
        return text if self._config.rebalance else f"rebalance is off: only draining engines are emptied\n{text}"

    def migrate(
        self,
        facts: Sequence[EngineFacts | None],
        rid: int,
        source: int,
        destination: int,
        how: str = MigrationMode.LIVE,
    ) -> None:
        """Order the migration of one request. Raises Refusal."""
        if how not in tuple(MigrationMode):
            raise Refusal(f"{how!r} is not one of {', '.join(MigrationMode)}")
        taker = running_engine(facts, destination)
        if source == destination:
            raise Refusal(f"the request is on engine {destination} already")
        if taker.state != EngineState.SERVING:
            raise Refusal(f"engine {destination} accepts no requests: it is {EngineState(taker.state).name.lower()}")
        giver = running_engine(facts, source)
        if taker.weights != giver.weights:
            raise Refusal(
                f"engines {source} and {destination} have different weights, and a request ends on the weights it "
                "began with; `llumctl restart` the engine that has the old ones",
                OTHER_WEIGHTS,
            )
        if taker.fingerprint != giver.fingerprint and how != MigrationMode.RECOMPUTE:
            raise Refusal(f"engines {source} and {destination} keep KV of different forms; use --how recompute")
        if how != MigrationMode.RECOMPUTE:
            _check_pool(pool_state(giver, destination), source, destination)
        if not self._send(facts, source, self._order(destination, rid=rid, how=how)):
            raise Refusal(f"engine {source} does not read its messages; try again")

    def _order(
        self,
        destination: int,
        *,
        rid: int = 0,
        drain: bool = False,
        how: str = MigrationMode.LIVE,
        reason: str = MigrationReason.OPERATOR,
    ) -> MigrateTo:
        lease = time.monotonic() + _LEASE_PERIODS * self._config.rebalance_period
        return MigrateTo(destination, lease, rid, self._config.migrate_choice, drain, how, reason)

    def _send(self, facts: Sequence[EngineFacts | None], engine: int, message: ToLlumlet) -> bool:
        """Return False if the ring is full: the engine has not read it for a long time."""
        sent = self._rings[engine].put(encode(message), running_engine(facts, engine).incarnation)
        self._fabric.ring_bell(self._fabric.topology.engine(engine))
        return sent


def _check_pool(state: PoolState, source: int, destination: int) -> None:
    """Raise Refusal unless `source` has the KV pool of `destination` open."""
    if state is PoolState.NOT_OPEN:
        raise Refusal(
            f"engine {source} has not opened the KV pool of engine {destination} yet: after a start this takes some "
            "time, seconds on GPUs; try again, or use --how recompute"
        )
    if state is PoolState.FAILED:
        raise Refusal(
            f"engine {source} cannot open the KV pool of engine {destination}, its log says why; "
            "use --how recompute, which copies nothing"
        )
