"""Executes the actions of the llumlet: messages to peers and frontends, copies into the peers' pools."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.migration.actions import Action, Copy, Readdress, Report, Send, Tell
from daemon.engine.telemetry import Telemetry
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import encode
from daemon.ipc.ring import RingWriter
from daemon.kvpool.pool_directory import PeerPools
from daemon.kvpool.transport import Outcome, Transport

log = logging.getLogger(__name__)


class CopyEnd(NamedTuple):
    """The end of a copy of `move`: nothing writes for it any more."""

    move: int
    arrived: bool
    nbytes: int


class _PeerOutbox:
    """Messages for one peer engine, in order; they wait here while the ring is full."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring
        self._waiting: deque[tuple[int, bytes]] = deque()  # receiving incarnation, message

    def put(self, incarnation: int, message: bytes) -> None:
        self._waiting.append((incarnation, message))

    def flush(self) -> bool:
        """Write messages while the ring has room; return True if any was written."""
        sent = False
        while self._waiting and self._ring.put(self._waiting[0][1], self._waiting[0][0]):
            self._waiting.popleft()
            sent = True
        return sent


class MigrationExecutor:
    """The I/O of one llumlet. `outboxes`: one per frontend, flushed by the worker."""

    def __init__(
        self,
        fabric: Fabric,
        outboxes: Sequence[FrontendOutbox],
        pools: PeerPools,
        transport: Transport,
        block_bytes: int,
        telemetry: Telemetry,
    ) -> None:
        topology = fabric.topology
        _, me = topology.role(fabric.process)
        self._fabric = fabric
        self._outboxes = outboxes
        self._pools = pools
        self._transport = transport
        self._block_bytes = block_bytes
        self._telemetry = telemetry
        self._peers = {i: _PeerOutbox(fabric.writer(topology.engine(i))) for i in range(topology.engines) if i != me}
        self._failed: list[int] = []  # moves whose copy could not begin

    def execute(self, actions: Iterable[Action]) -> None:
        """Execute the actions in order. Messages are queued; `flush` and the outboxes' `flush` write them."""
        for action in actions:
            match action:
                case Send(peer, message):
                    self._peers[peer.engine].put(peer.incarnation, encode(message))
                case Tell(frontend, message):
                    self._outboxes[frontend].tell(message)
                case Readdress(frontend, incarnation):
                    self._outboxes[frontend].readdress(incarnation)
                case Copy():
                    self._copy(action)
                case Report():
                    self._telemetry.move(action)

    def flush(self) -> None:
        """Write the queued messages to the peers' rings and ring the doorbells of the peers that got any."""
        for engine, outbox in self._peers.items():
            if outbox.flush():
                self._fabric.ring_bell(self._fabric.topology.engine(engine))

    def ended(self) -> list[CopyEnd]:
        """Return the copies that have ended since the last call."""
        ends = [CopyEnd(move, False, 0) for move in self._failed]
        self._failed.clear()
        for completion in self._transport.completed():
            if completion.outcome is not Outcome.DONE:
                log.warning("a copy of KV blocks ended early: %s", completion.reason or "cancelled")
            move, arrived = completion.key, completion.outcome is Outcome.DONE
            assert isinstance(move, int)
            ends.append(CopyEnd(move, arrived, completion.nbytes))
        return ends

    def _copy(self, copy: Copy) -> None:
        pool = self._pools.pool(copy.peer.engine, copy.peer.incarnation)
        if pool is None:
            self._failed.append(copy.move)
            return
        self._transport.push(copy.move, pool, copy.pairs, self._block_bytes)
