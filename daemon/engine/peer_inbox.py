"""Reads the rings from the other engines and the coordinator, and detects the deaths of engines."""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.engine.migration.actions import Action
from daemon.engine.migration.llumlet import Llumlet
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.messages import (
    EngineFacts,
    EngineIncarnation,
    MigrateTo,
    Reserve,
    decode_engine_facts,
    decode_to_llumlet,
    decode_to_peer,
)
from daemon.ipc.process_table import ProcessState


class PeerInbox:
    """Messages from peers and coordinator."""

    def __init__(
        self, fabric: Fabric, llumlet: Llumlet, on_reserve: Callable[[Reserve], None] = lambda reserve: None
    ) -> None:
        """`on_reserve` is called with each reservation: a request is about to arrive."""
        topology = fabric.topology
        _, me = topology.role(fabric.process)
        others = [i for i in range(topology.engines) if i != me]
        self._fabric = fabric
        self._llumlet = llumlet
        self._on_reserve = on_reserve
        self._table = fabric.table()
        self._alive = dict.fromkeys(others, 0)  # engine: live incarnation, 0 if none
        self._dead = dict.fromkeys(others, 0)  # engine: last incarnation known to be dead
        self._rings = {i: fabric.reader(topology.engine(i)) for i in others}
        self._boards = {i: fabric.board_of(topology.engine(i)) for i in others}
        self._orders = fabric.reader(COORDINATOR)

    def read(self) -> list[Action]:
        """Read all messages, handle deaths, and return the actions, in order. Execute them, then call `ack`.

        The process table is read first and deaths are handled last: everything that a peer wrote before it died
        takes effect before its death does.
        """
        changed = self._table.refresh()
        actions: list[Action] = []
        for engine, ring in self._rings.items():
            while (record := ring.read()) is not None:
                if record.receiver == self._fabric.incarnation:
                    peer, message = EngineIncarnation(engine, record.sender), decode_to_peer(record.payload)
                    if isinstance(message, Reserve):
                        self._on_reserve(message)
                    actions += self._llumlet.on_peer(peer, message, time.monotonic())
        if changed:
            actions += self._handle_deaths()
        while (record := self._orders.read()) is not None:
            if record.receiver == self._fabric.incarnation:
                actions += self._handle_order(decode_to_llumlet(record.payload))
        return actions

    def ack(self) -> None:
        """Free the rings' space of all that was read. Call it once the actions are executed."""
        for ring in self._rings.values():
            ring.ack()
        self._orders.ack()

    def _handle_deaths(self) -> list[Action]:
        actions: list[Action] = []
        for engine in self._alive:
            row = self._table.rows[self._fabric.topology.engine(engine)]
            up = row.state == ProcessState.UP
            self._alive[engine] = row.incarnation if up else 0
            dead = row.incarnation - up
            if dead > self._dead[engine]:  # this incarnation, and any earlier one that began and died unseen
                self._dead[engine] = dead
                actions += self._llumlet.on_peer_death(EngineIncarnation(engine, dead), time.monotonic())
        return actions

    def _handle_order(self, order: MigrateTo) -> list[Action]:
        peer = EngineIncarnation(order.engine, self._alive.get(order.engine, 0))
        if self.facts_of(peer) is None:
            return []
        return self._llumlet.migrate_to(peer, order, time.monotonic())

    def facts_of(self, peer: EngineIncarnation) -> EngineFacts | None:
        """Return the last facts of that incarnation of an engine; None if it is dead or has published none."""
        is_alive = peer.incarnation and peer.incarnation == self._alive[peer.engine]
        found = self._boards[peer.engine].read() if is_alive else None
        facts = decode_engine_facts(found[1]) if found else None
        return facts if facts and facts.incarnation == peer.incarnation else None

    def alive(self) -> list[EngineFacts]:
        """Return the last facts of each live engine."""
        alive = (EngineIncarnation(engine, incarnation) for engine, incarnation in self._alive.items() if incarnation)
        found = (self.facts_of(peer) for peer in alive)
        return [facts for facts in found if facts is not None]
