"""The coordinator's deeds: sends each pair's source its order, period after period, and drains engines.

The decisions are `rebalance`'s; this reads the boards for it and writes to the rings. An order is a lease of two
periods: when the coordinator dies, the moves it has ordered end by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from daemon.config import Config
from daemon.control.policy.freeness import policy_of
from daemon.control.policy.rebalancing import Pair, RebalanceRules, explain, pair
from daemon.enums import MigrationMode, MigrationReason
from daemon.ipc.desired_state import DesiredStateWriter, served_without
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Ordered
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineFacts, EngineState, MigrateTo, ToLlumlet, encode

_LEASE_PERIODS = 2


class Refusal(Exception):
    """What an operator asks for cannot be done; the message says why."""


class Rebalancer:
    """Pairs engines once a period, and says which are to serve."""

    def __init__(self, fabric: Fabric, config: Config) -> None:
        topology = fabric.topology
        self._fabric = fabric
        self._config = config
        self._rules = RebalanceRules.of(policy_of(config.policy, config.headroom))
        self._lanes = [fabric.writer(topology.engine(i)) for i in range(topology.engines)]
        self._pairs: list[Pair] = []
        self.desired_states = DesiredStateWriter(fabric.desired_states())
        self.log = EventWriter(fabric.events(fabric.process))  # the coordinator's

    def cycle(self, facts: Sequence[EngineFacts | None]) -> None:
        """One period: renew and make pairs, and tell their sources."""
        made = pair(facts, self._rules, self._pairs)
        # Of those that nobody acts upon none is held: it would keep its engines from those that drain.
        held = {(p.source, p.destination) for p in self._pairs}
        self._pairs = [p for p in made if self._config.rebalance or p.reason == MigrationReason.DRAINING]
        for each in self._pairs:
            if (each.source, each.destination) not in held:
                detail = f"to engine {each.destination} for {each.reason}"
                self.log.write(Ordered("rebalance", "", each.source, detail, "the scheduler"))
            order = self._order(each.destination, drain=each.reason == MigrationReason.DRAINING, reason=each.reason)
            self._tell(facts, each.source, order)

    def explain(self, facts: Sequence[EngineFacts | None]) -> str:
        """What the next cycle would do, and why."""
        text = explain(facts, self._rules, self._pairs)
        return text if self._config.rebalance else f"rebalance is off: only what drains is moved\n{text}"

    def migrate(
        self,
        facts: Sequence[EngineFacts | None],
        rid: int,
        source: int,
        destination: int,
        how: str = MigrationMode.LIVE,
    ) -> None:
        """Order one request to move. Raises Refusal."""
        if how not in tuple(MigrationMode):
            raise Refusal(f"{how!r} is not one of {', '.join(MigrationMode)}")
        there = self._engine(facts, destination)
        if source == destination:
            raise Refusal(f"the request is on engine {destination} already")
        if there.state != EngineState.SERVING:
            raise Refusal(f"engine {destination} takes nothing: it is {EngineState(there.state).name.lower()}")
        if there.kv_format != self._engine(facts, source).kv_format:
            raise Refusal(f"engines {source} and {destination} keep their KV in different formats")
        if not self._tell(facts, source, self._order(destination, rid=rid, how=how)):
            raise Refusal(f"engine {source} does not listen; try again")

    def set_state(self, facts: Sequence[EngineFacts | None], engine: int, state: EngineState) -> None:
        """An operator wants the engine in that state. Raises Refusal where nobody would be left to serve."""
        if not 0 <= engine < len(facts):
            raise Refusal(f"there is no engine {engine}")
        if state != EngineState.SERVING:
            self._engine(facts, engine)
            serving = self.desired_states.of(engine) == EngineState.SERVING
            if serving and not served_without(engine, facts, self.desired_states):
                raise Refusal(f"engine {engine} is the last that serves; nobody could take its requests")
        self.set_desired_state(engine, state)

    def set_desired_state(self, engine: int, state: EngineState) -> None:
        """The engine sees it at once; the supervisor, which wakes one that sleeps, at its next tick."""
        self.desired_states.put(engine, state)
        self._fabric.ring_bell(self._fabric.topology.engine(engine))

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

    def _tell(self, facts: Sequence[EngineFacts | None], engine: int, message: ToLlumlet) -> bool:
        """False if the ring is full: that engine has not looked for long."""
        sent = self._lanes[engine].put(encode(message), self._engine(facts, engine).incarnation)
        self._fabric.ring_bell(self._fabric.topology.engine(engine))
        return sent

    def _engine(self, facts: Sequence[EngineFacts | None], engine: int) -> EngineFacts:
        found = facts[engine] if 0 <= engine < len(facts) else None
        if found is None:
            raise Refusal(f"there is no engine {engine} that runs")
        return found
