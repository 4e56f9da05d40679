"""A frontend's ends towards the engines, and what it reads of the other frontends."""

from __future__ import annotations

from collections import deque

from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import Demand, EngineFacts, FrontendFacts, decode_engine_facts, decode_frontend_facts


class EngineLink:
    """This frontend's ends towards one engine."""

    def __init__(self, fabric: Fabric, index: int) -> None:
        self.index = index
        self.process = fabric.topology.engine(index)
        self.commands = fabric.writer(self.process)
        self.outputs = fabric.reader(self.process)
        self.board = fabric.board_of(self.process)
        self.incarnation = 0  # of the engine now alive; 0: none
        self.facts: EngineFacts | None = None  # of that incarnation
        self.backlog: deque[tuple[int, bytes]] = deque()  # (receiver, command) that found the ring full
        self.submitted = Demand(0, 0, 0)  # since that incarnation was met
        self._version = 0

    def meet(self, incarnation: int) -> None:
        """The engine was replaced (or, 0, died)."""
        self.incarnation = incarnation
        self.facts = None
        self.submitted = Demand(incarnation, 0, 0)

    def refresh(self) -> EngineFacts | None:
        """Facts as last published by the present incarnation."""
        version = self.board.version
        if version != self._version or (self.facts is None and self.incarnation):
            found = self.board.read()
            if found is not None:
                self._version = found[0]
                facts = decode_engine_facts(found[1])
                self.facts = facts if facts.incarnation == self.incarnation else None
        return self.facts


class OtherFrontend:
    """Another frontend's board, for the demand it has submitted."""

    def __init__(self, fabric: Fabric, index: int) -> None:
        self._board = fabric.board_of(fabric.topology.frontend(index))
        self._version = 0
        self._facts: FrontendFacts | None = None

    def refresh(self) -> FrontendFacts | None:
        if self._board.version != self._version and (found := self._board.read()) is not None:
            self._version = found[0]
            self._facts = decode_frontend_facts(found[1])
        return self._facts
