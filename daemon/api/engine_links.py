"""The engines as a frontend knows them: which live, which is freest, and the way to each."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import TypeGuard

from daemon.api.engine_link import EngineLink, OtherFrontend
from daemon.api.generator import NoEngine
from daemon.api.prefix_affinity import PrefixAffinity
from daemon.config import Config
from daemon.control.policy.dispatch import choose, in_flight
from daemon.control.policy.freeness import policy_of
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import (
    Demand,
    EngineFacts,
    EngineIncarnation,
    EngineState,
    FrontendFacts,
    Start,
    ToEngine,
    encode,
)
from daemon.ipc.process_table import ProcessFacts, ProcessState, engine_state

_FULL_RETRY = 0.05  # seconds until a command that found its ring full is tried again


class EngineLinks:
    """Of one frontend, on its event loop's thread."""

    def __init__(self, fabric: Fabric, config: Config) -> None:
        topology = fabric.topology
        _, index = topology.role(fabric.process)
        self.links = [EngineLink(fabric, i) for i in range(topology.engines)]
        self._peers = [OtherFrontend(fabric, k) if k != index else None for k in range(topology.frontends)]
        self._fabric = fabric
        self._table = fabric.table()
        self._board = fabric.board()
        self._mine = FrontendFacts(fabric.incarnation, [link.submitted for link in self.links], 0, True)
        self._policy = policy_of(config.policy, config.headroom)
        self._affinity: PrefixAffinity | None = None
        if config.prefix_affinity and config.prefix_caching and topology.engines > 1:
            self._affinity = PrefixAffinity(topology.engines, config.block_size)
        self._turn = index

    # -- who is there -----------------------------------------------------------------------------

    def look(self) -> bool:
        """Read the process table; whether it has changed."""
        return self._table.refresh()

    def row(self, link: EngineLink) -> ProcessFacts:
        """What the table says of an engine."""
        return self._table.rows[link.process]

    def meet(self) -> list[EngineLink]:
        """Know all who are alive by the table; those of them who are new."""
        new = []
        for link in self.links:
            row = self.row(link)
            alive = row.incarnation if row.state == ProcessState.UP else 0
            if alive != link.incarnation:
                link.meet(alive)
                if self._affinity is not None:
                    self._affinity.forget(link.index)
                if alive:
                    new.append(link)
        return new

    def owner(self, engine: int) -> EngineIncarnation:
        """The present life of an engine."""
        return EngineIncarnation(engine, self.links[engine].incarnation)

    def may_come(self, *, draining: bool) -> bool:
        """Whether an engine may serve some time, though none does now. None is started while the daemon drains."""
        coming = (ProcessState.UP,) if draining else (ProcessState.UP, ProcessState.DEAD, ProcessState.ABSENT)
        return any(self.row(link).state in coming for link in self.links)

    def facts(self) -> list[EngineFacts | None]:
        """Facts of each engine as last published; None of one that is not there."""
        return [link.refresh() for link in self.links]

    def serving(self) -> list[EngineFacts]:
        return [f for f in self.facts() if _serves(f)]

    def states(self) -> list[str]:
        """What operators call the state of each engine."""
        found = []
        for link in self.links:
            facts, progress = link.refresh(), self._fabric.progress(link.process)
            published = EngineState(facts.state) if facts is not None else progress.state
            found.append(engine_state(self.row(link).state, published))
        return found

    # -- dispatch ---------------------------------------------------------------------------------

    def names(self, prompt: array[int], salt: bytes) -> list[int]:
        """The beginnings of a prompt, for `choose` and `note`."""
        return self._affinity.names(prompt, salt) if self._affinity is not None else []

    def note(self, names: Sequence[int], engine: int) -> None:
        """The engine will hold these beginnings."""
        if self._affinity is not None:
            self._affinity.record(names, engine)

    def choose(self, avoid: int = -1, high: bool = False, names: Sequence[int] = ()) -> int:
        """The freest engine, or one about as free that is thought to hold a beginning of the prompt, by its `names`;
        `avoid` only if there is no other. Raises NoEngine."""
        facts = self.facts()
        if avoid >= 0:
            others = [f if i != avoid else None for i, f in enumerate(facts)]
            if any(map(_serves, others)):
                facts = others
        frontends = [self._mine if peer is None else peer.refresh() for peer in self._peers]
        matched = self._affinity.matched(names) if self._affinity is not None else None
        self._turn += 1
        flying = in_flight(facts, frontends)
        engine = choose(facts, flying, self._turn, policy=self._policy, high=high, matched=matched)
        if engine is None:
            raise NoEngine("no engine is ready")
        return engine

    # -- messages ---------------------------------------------------------------------------------

    def start(self, owner: EngineIncarnation, message: Start) -> None:
        """Send a Start, and count it in what was sent; `publish` it then."""
        link = self.links[owner.engine]
        before = link.submitted
        link.submitted = Demand(before.peer, before.requests + 1, before.tokens + message.tokens)
        self.send(owner, message)

    def send(self, owner: EngineIncarnation, message: ToEngine) -> None:
        """To that life of the engine, be it known here yet or not: another one drops it."""
        link, blob = self.links[owner.engine], encode(message)
        if link.backlog or not link.commands.put(blob, owner.incarnation):
            link.backlog.append((owner.incarnation, blob))
            asyncio.get_running_loop().call_later(_FULL_RETRY, self.flush, link)
        self._fabric.ring_bell(link.process)

    def flush(self, link: EngineLink) -> None:
        """Send what found the ring full, as far as it goes."""
        if not link.backlog:
            return
        while link.backlog and link.commands.put(link.backlog[0][1], link.backlog[0][0]):
            link.backlog.popleft()
        self._fabric.ring_bell(link.process)
        if link.backlog:
            asyncio.get_running_loop().call_later(_FULL_RETRY, self.flush, link)

    def publish(self, active: int, *, taking: bool) -> None:
        """Tell all what this frontend has sent to whom, how many requests it has, and whether it takes any."""
        submitted = [link.submitted for link in self.links]
        self._mine = FrontendFacts(self._fabric.incarnation, submitted, active, taking)
        self._board.publish(encode(self._mine))


def _serves(facts: EngineFacts | None) -> TypeGuard[EngineFacts]:
    return facts is not None and facts.state == EngineState.SERVING
