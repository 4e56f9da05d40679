"""The engines as one frontend sees them: facts from their boards, choice of the freest, rings to and from each."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import TypeGuard

from daemon.api.generator import NoEngine
from daemon.api.prefix_affinity import PrefixAffinity
from daemon.config import Config
from daemon.control.policy.dispatch import choose, count_in_flight
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
    decode_engine_facts,
    decode_frontend_facts,
    encode,
)
from daemon.ipc.process_table import ProcessFacts, ProcessState, engine_state

HUNG_AFTER = 5.0  # seconds overdue
_FULL_RETRY = 0.05  # seconds until a command that found its ring full is sent again


class EngineLink:
    """The command ring, the output ring and the board between this frontend and one engine."""

    def __init__(self, fabric: Fabric, index: int) -> None:
        self.index = index
        self.process = fabric.topology.engine(index)
        self.commands = fabric.writer(self.process)
        self.outputs = fabric.reader(self.process)
        self.board = fabric.board_of(self.process)
        self._progress = fabric.progress(self.process)
        self.incarnation = 0  # of the engine that is alive now; 0: none
        self.facts: EngineFacts | None = None  # of that incarnation
        self.backlog: deque[tuple[int, bytes]] = deque()  # (receiver, command): found the ring full
        self.submitted = Demand(0, 0, 0)  # sent to that incarnation
        self._version = 0

    def on_new_incarnation(self, incarnation: int) -> None:
        """Forget the facts and the demand of the previous incarnation. 0: the engine died."""
        self.incarnation = incarnation
        self.facts = None
        self.submitted = Demand(incarnation, 0, 0)

    def overdue(self, now: float) -> float:
        """Return the seconds since the sign of life that the engine has promised; negative if none is due."""
        return self._progress.overdue(now) if self._progress.incarnation == self.incarnation else -1.0

    def refresh(self) -> EngineFacts | None:
        """Return the latest facts of the current incarnation; None if it has published none."""
        version = self.board.version
        if version != self._version or (self.facts is None and self.incarnation):
            found = self.board.read()
            if found is not None:
                self._version = found[0]
                facts = decode_engine_facts(found[1])
                self.facts = facts if facts.incarnation == self.incarnation else None
        return self.facts


class PeerFrontend:
    """Another frontend's board: the demand that it has submitted to each engine."""

    def __init__(self, fabric: Fabric, index: int) -> None:
        self._board = fabric.board_of(fabric.topology.frontend(index))
        self._version = 0
        self._facts: FrontendFacts | None = None

    def refresh(self) -> FrontendFacts | None:
        """Return the latest facts that it has published."""
        if self._board.version != self._version and (found := self._board.read()) is not None:
            self._version = found[0]
            self._facts = decode_frontend_facts(found[1])
        return self._facts


class EngineLinks:
    """All engine links of one frontend. Used on its event loop's thread only."""

    def __init__(self, fabric: Fabric, config: Config) -> None:
        topology = fabric.topology
        _, index = topology.role(fabric.process)
        self.links = [EngineLink(fabric, i) for i in range(topology.engines)]
        self._peers = [PeerFrontend(fabric, k) if k != index else None for k in range(topology.frontends)]
        self._fabric = fabric
        self._table = fabric.table()
        self._board = fabric.board()
        self._own_facts = FrontendFacts(fabric.incarnation, [link.submitted for link in self.links], 0, True)
        self._policy = policy_of(config.policy, config.headroom)
        self._affinity: PrefixAffinity | None = None
        if config.prefix_affinity and config.prefix_caching and topology.engines > 1:
            self._affinity = PrefixAffinity(topology.engines, config.block_size)
        self._turn = index

    # -- process table ------------------------------------------------------------------------------

    def refresh_table(self) -> bool:
        """Read the process table. Return True if it has changed."""
        return self._table.refresh()

    def table_row(self, link: EngineLink) -> ProcessFacts:
        """Return the engine's row of the process table."""
        return self._table.rows[link.process]

    def update_incarnations(self) -> list[EngineLink]:
        """Store each engine's incarnation as the table has it. Return the links of new incarnations."""
        new = []
        for link in self.links:
            row = self.table_row(link)
            alive = row.incarnation if row.state == ProcessState.UP else 0
            if alive != link.incarnation:
                link.on_new_incarnation(alive)
                if self._affinity is not None:
                    self._affinity.forget(link.index)
                if alive:
                    new.append(link)
        return new

    def current(self, engine: int) -> EngineIncarnation:
        """Return the incarnation of the engine that is alive now."""
        return EngineIncarnation(engine, self.links[engine].incarnation)

    def weights(self, engine: int) -> int:
        """Return what identifies the weights of the engine that is alive now; 0 if it has not told."""
        facts = self.links[engine].facts
        return facts.weights if facts is not None else 0

    def may_serve_later(self, *, draining: bool, weights: int = 0) -> bool:
        """Return True if an engine may serve later although none serves now.

        `draining`: the daemon drains, so the supervisor starts no engine any more. `weights`: the engine must have
        them; one that has not loaded yet may.
        """
        possible = (ProcessState.UP,) if draining else (ProcessState.UP, ProcessState.DEAD, ProcessState.ABSENT)
        rows = ((self.table_row(link), link.refresh()) for link in self.links)
        return any(row.state in possible and (facts is None or _has(facts, weights)) for row, facts in rows)

    # -- facts --------------------------------------------------------------------------------------

    def facts(self) -> list[EngineFacts | None]:
        """Return the latest facts of each engine; None for an engine that is not alive or has published none."""
        return [link.refresh() for link in self.links]

    def serving(self) -> list[EngineFacts]:
        """Return the facts of the engines that serve."""
        return [f for f in self.facts() if _serves(f)]

    def hung(self, now: float) -> list[EngineLink]:
        """Return the engines that are overdue by so much that their requests should continue elsewhere; none unless
        another engine with the same weights serves and is on time."""
        on_time = [link.facts for link in self.links if _serves(link.refresh()) and link.overdue(now) <= 0]
        weights = {facts.weights for facts in on_time if facts is not None}
        late = [link for link in self.links if link.overdue(now) > HUNG_AFTER]
        return [link for link in late if weights and (link.facts is None or link.facts.weights in weights)]

    def states(self) -> list[str]:
        """Return each engine's state, one of `process_table.ENGINE_STATES`."""
        found = []
        for link in self.links:
            facts, progress = link.refresh(), self._fabric.progress(link.process)
            published = EngineState(facts.state) if facts is not None else progress.state
            found.append(engine_state(self.table_row(link).state, published))
        return found

    # -- dispatch -----------------------------------------------------------------------------------

    def prefix_keys(self, prompt: array[int], salt: bytes) -> list[int]:
        """Return the keys of the prompt's prefixes, for `choose` and `record_prefixes`."""
        return self._affinity.keys(prompt, salt) if self._affinity is not None else []

    def record_prefixes(self, keys: Sequence[int], engine: int) -> None:
        """Record that the engine will hold the prefixes with these keys."""
        if self._affinity is not None:
            self._affinity.record(keys, engine)

    def choose(self, avoid: int = -1, high: bool = False, prefix_keys: Sequence[int] = (), weights: int = 0) -> int:
        """Return the index of the freest engine, or of one about as free that probably holds a prefix of the prompt.

        `avoid`: an engine that is returned only if no other serves. An engine that is overdue is avoided, too.
        `high`: the request is of high priority. `prefix_keys`: of the prompt. `weights`: those that the engine must
        have; 0: any. Raises NoEngine.
        """
        now = time.monotonic()
        facts = [f if f is None or _has(f, weights) else None for f in self.facts()]
        facts = _without(facts, {link.index for link in self.links if link.overdue(now) > 0})
        facts = _without(facts, {avoid})
        frontends = [self._own_facts if peer is None else peer.refresh() for peer in self._peers]
        matched = self._affinity.matched(prefix_keys) if self._affinity is not None else None
        self._turn += 1
        sent = count_in_flight(facts, frontends)
        engine = choose(facts, sent, self._turn, policy=self._policy, high=high, matched=matched)
        if engine is None:
            raise NoEngine("no engine is ready")
        return engine

    # -- messages -----------------------------------------------------------------------------------

    def start(self, owner: EngineIncarnation, message: Start) -> None:
        """Send a Start and add it to the submitted demand. The caller calls `publish` afterwards."""
        link = self.links[owner.engine]
        before = link.submitted
        link.submitted = Demand(before.peer, before.requests + 1, before.tokens + message.tokens)
        self.send(owner, message)

    def send(self, owner: EngineIncarnation, message: ToEngine) -> None:
        """Send to this incarnation of the engine, even if it is not known here yet. Other incarnations drop it."""
        link, blob = self.links[owner.engine], encode(message)
        if link.backlog or not link.commands.put(blob, owner.incarnation):
            link.backlog.append((owner.incarnation, blob))
            asyncio.get_running_loop().call_later(_FULL_RETRY, self.flush, link)
        self._fabric.ring_bell(link.process)

    def flush(self, link: EngineLink) -> None:
        """Send commands from the backlog until the ring is full again."""
        if not link.backlog:
            return
        while link.backlog and link.commands.put(link.backlog[0][1], link.backlog[0][0]):
            link.backlog.popleft()
        self._fabric.ring_bell(link.process)
        if link.backlog:
            asyncio.get_running_loop().call_later(_FULL_RETRY, self.flush, link)

    def publish(self, active: int, *, taking: bool) -> None:
        """Publish on this frontend's board: demand submitted to each engine, `active` requests, and `taking`.

        `taking`: True while the frontend accepts new requests.
        """
        submitted = [link.submitted for link in self.links]
        self._own_facts = FrontendFacts(self._fabric.incarnation, submitted, active, taking)
        self._board.publish(encode(self._own_facts))


def _serves(facts: EngineFacts | None) -> TypeGuard[EngineFacts]:
    return facts is not None and facts.state == EngineState.SERVING


def _has(facts: EngineFacts, weights: int) -> bool:
    """Return True if the engine has these weights; 0 stands for any."""
    return not weights or facts.weights == weights


def _without(facts: list[EngineFacts | None], avoided: set[int]) -> list[EngineFacts | None]:
    """Return `facts` with None for the avoided engines, if another one serves."""
    others = [f if i not in avoided else None for i, f in enumerate(facts)]
    return others if any(map(_serves, others)) else facts
