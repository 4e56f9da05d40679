"""What the other engines and the coordinator say to this one, and whether they live."""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.engine.migration.llumlet import Action, Llumlet
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.messages import (
    EngineFacts,
    EngineIncarnation,
    MigrateTo,
    decode_engine_facts,
    decode_to_llumlet,
    decode_to_peer,
)
from daemon.ipc.process_table import ProcessState


class PeerInbox:
    """Reads the lanes from peers and coordinator. `kv_format`: blocks move between equal ones only."""

    def __init__(
        self, fabric: Fabric, llumlet: Llumlet, kv_format: str, execute: Callable[[list[Action]], None]
    ) -> None:
        topology = fabric.topology
        _, me = topology.role(fabric.process)
        others = [i for i in range(topology.engines) if i != me]
        self._fabric = fabric
        self._llumlet = llumlet
        self._kv_format = kv_format
        self._execute = execute
        self._table = fabric.table()
        self._lives = dict.fromkeys(others, 0)  # engine: incarnation alive, 0 if none
        self._dead = dict.fromkeys(others, 0)  # engine: last incarnation known to be over
        self._lanes = {i: fabric.reader(topology.engine(i)) for i in others}
        self._boards = {i: fabric.board_of(topology.engine(i)) for i in others}
        self._orders = fabric.reader(COORDINATOR)

    def listen(self) -> None:
        """Take what they have written. The table is read first, deaths are handled last: all that a peer had
        written before it died counts before its death does."""
        changed = self._table.refresh()
        for engine, lane in self._lanes.items():
            while (record := lane.read()) is not None:
                if record.receiver == self._fabric.incarnation:
                    peer, message = EngineIncarnation(engine, record.sender), decode_to_peer(record.payload)
                    self._execute(self._llumlet.on_peer(peer, message, time.monotonic()))
            lane.ack()
        if changed:
            self._handle_engine_death()
        while (record := self._orders.read()) is not None:
            if record.receiver == self._fabric.incarnation:
                self._handle(decode_to_llumlet(record.payload))
        self._orders.ack()

    def _handle_engine_death(self) -> None:
        for engine in self._lives:
            row = self._table.rows[self._fabric.topology.engine(engine)]
            up = row.state == ProcessState.UP
            self._lives[engine] = row.incarnation if up else 0
            dead = row.incarnation - up
            if dead > self._dead[engine]:  # that life, and any earlier one that came and went unseen
                self._dead[engine] = dead
                self._execute(self._llumlet.peer_died(EngineIncarnation(engine, dead), time.monotonic()))

    def _handle(self, order: MigrateTo) -> None:
        if self._fits(order.engine):
            peer = EngineIncarnation(order.engine, self._lives[order.engine])
            self._execute(self._llumlet.migrate_to(peer, order, time.monotonic()))

    def facts_of(self, peer: EngineIncarnation) -> EngineFacts | None:
        """What that life of an engine has published last, if it is not over."""
        found = self._boards[peer.engine].read() if peer.incarnation == self._lives[peer.engine] else None
        facts = decode_engine_facts(found[1]) if found else None
        return facts if facts and facts.incarnation == peer.incarnation else None

    def alive(self) -> list[EngineFacts]:
        """What each engine that lives has published last."""
        found = (self.facts_of(EngineIncarnation(engine, life)) for engine, life in self._lives.items() if life)
        return [facts for facts in found if facts is not None]

    def _fits(self, engine: int) -> bool:
        """Whether it lives and its blocks are of the same make."""
        alive = self._lives.get(engine)
        facts = self.facts_of(EngineIncarnation(engine, alive)) if alive else None
        return facts is not None and facts.kv_format == self._kv_format
