"""Carries out what the llumlet decides: messages to peers and frontends, copies into peers' pools."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.migration.llumlet import Action, Copy, Report, Send, Tell
from daemon.engine.telemetry import Telemetry
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import encode
from daemon.ipc.ring import RingWriter
from daemon.kvpool.host_pools import PeerPools
from daemon.kvpool.host_transport import Outcome, Transport

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """A copy of `move` is over: no byte of it will be written any more."""

    move: int
    arrived: bool
    nbytes: int


class _Line:
    """The ring to one peer engine; what finds it full waits, in order."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring
        self._waiting: deque[tuple[int, bytes]] = deque()  # incarnation meant, message

    def put(self, incarnation: int, message: bytes) -> None:
        self._waiting.append((incarnation, message))

    def flush(self) -> bool:
        """True if anything went."""
        sent = False
        while self._waiting and self._ring.put(self._waiting[0][1], self._waiting[0][0]):
            self._waiting.popleft()
            sent = True
        return sent


class MigrationExecutor:
    """The I/O of one llumlet. `outboxes`: one a frontend, flushed by the worker."""

    def __init__(
        self,
        fabric: Fabric,
        outboxes: Sequence[FrontendOutbox],
        peers: PeerPools,
        transport: Transport,
        block_bytes: int,
        telemetry: Telemetry,
    ) -> None:
        topology = fabric.topology
        _, me = topology.role(fabric.process)
        self._fabric = fabric
        self._outboxes = outboxes
        self._peers = peers
        self._transport = transport
        self._block_bytes = block_bytes
        self._telemetry = telemetry
        self._lines = {i: _Line(fabric.writer(topology.engine(i))) for i in range(topology.engines) if i != me}
        self._failed: list[int] = []  # moves whose copy could not even begin

    def execute(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(peer, message):
                    self._lines[peer.engine].put(peer.incarnation, encode(message))
                case Tell(frontend, message):
                    self._outboxes[frontend].tell(message)
                case Copy():
                    self._copy(action)
                case Report():
                    self._telemetry.move(action)

    def flush(self) -> None:
        """Put on the rings what they take, and wake who got something."""
        for engine, line in self._lines.items():
            if line.flush():
                self._fabric.ring_bell(self._fabric.topology.engine(engine))

    def ended(self) -> list[Ended]:
        """Copies that are over since the last call."""
        over = [Ended(move, False, 0) for move in self._failed]
        self._failed.clear()
        for completion in self._transport.completed():
            if completion.outcome is not Outcome.DONE:
                log.warning("a copy of KV blocks ended early: %s", completion.reason or "cancelled")
            move, arrived = completion.key, completion.outcome is Outcome.DONE
            assert isinstance(move, int)
            over.append(Ended(move, arrived, completion.nbytes))
        return over

    def _copy(self, copy: Copy) -> None:
        pool = self._peers.pool(copy.peer.engine, copy.peer.incarnation)
        if pool is None:
            self._failed.append(copy.move)
            return
        self._transport.push(copy.move, pool, copy.pairs, self._block_bytes)
