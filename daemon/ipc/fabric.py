"""The fabric: the shared segment that connects all processes, its layout, and the view that each process has of it.

One segment contains process table, progress words, boards, metrics pages, desired states, restart orders, event
rings, the keys page and rings. `Layout` computes every offset from the topology alone. Journals, outboxes and KV
pools are separate segments. There is one ring for each directed pair of processes that communicate. Processes have
numbers: 0 is the coordinator, then come the frontends, then the engines.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import NamedTuple

from daemon.ipc import doorbell, segment
from daemon.ipc.board import BOARD_BYTES, BoardReader, BoardWriter
from daemon.ipc.keys_page import KEYS_PAGE_BYTES
from daemon.ipc.process_table import PROGRESS_BYTES, Progress, TableReader, TableWriter
from daemon.ipc.ring import PAGE, RingReader, RingWriter, ring_bytes
from daemon.ipc.shutdown import Shutdown

COORDINATOR = 0

COMMAND_RING = 256 << 10  # frontend -> engine: prompts stay in the journal, so records are small
OUTPUT_RING = 1 << 20  # engine -> frontend: a step's tokens and logprobs
ORDER_RING = 64 << 10  # coordinator -> frontend and engine
PEER_RING = 256 << 10  # engine -> engine: a reservation names a block for each 16 tokens
METRICS_BYTES = 16 << 10  # metrics page of one process
EVENT_BYTES = 128 << 10  # event ring of one process


class Topology(NamedTuple):
    """The number of frontends and engines, and the numbers of all processes."""

    frontends: int
    engines: int

    @property
    def processes(self) -> int:
        return 1 + self.frontends + self.engines

    def frontend(self, k: int) -> int:
        """Return the process number of frontend k."""
        return 1 + k

    def engine(self, i: int) -> int:
        """Return the process number of engine i."""
        return 1 + self.frontends + i

    def role(self, process: int) -> tuple[str, int]:
        """Return ("coordinator" | "frontend" | "engine", index) for a process number."""
        if process == COORDINATOR:
            return "coordinator", 0
        if process <= self.frontends:
            return "frontend", process - 1
        return "engine", process - 1 - self.frontends

    def name(self, process: int) -> str:
        """Return the name of a process in logs, such as "coordinator" or "engine 0"."""
        role, index = self.role(process)
        return role if process == COORDINATOR else f"{role} {index}"

    def rings(self) -> dict[tuple[int, int], int]:
        """Return every directed pair of processes that communicate, with the capacity of its ring in bytes."""
        found: dict[tuple[int, int], int] = {}
        for i in range(self.engines):
            found[COORDINATOR, self.engine(i)] = ORDER_RING
            for j in range(self.engines):
                if i != j:
                    found[self.engine(i), self.engine(j)] = PEER_RING
        for k in range(self.frontends):
            found[COORDINATOR, self.frontend(k)] = ORDER_RING
            for i in range(self.engines):
                found[self.frontend(k), self.engine(i)] = COMMAND_RING
                found[self.engine(i), self.frontend(k)] = OUTPUT_RING
        return found


class Layout:
    """Byte offsets in the fabric segment. Page 0 has the table's generation word and the shutdown word."""

    def __init__(self, topology: Topology) -> None:
        n = topology.processes
        self.progress = PAGE
        self.table = _page_up(self.progress + n * PROGRESS_BYTES)
        self.boards = self.table + n * BOARD_BYTES
        self.metrics = self.boards + n * BOARD_BYTES
        self.desired_states = _page_up(self.metrics + n * METRICS_BYTES)
        self.restart_orders = self.desired_states + topology.engines * 8
        self.events = _page_up(self.restart_orders + n * 8)
        self.keys_page = _page_up(self.events + n * EVENT_BYTES)
        end = self.keys_page + KEYS_PAGE_BYTES
        self.rings: dict[tuple[int, int], tuple[int, int]] = {}
        for pair, capacity in topology.rings().items():
            self.rings[pair] = (end, ring_bytes(capacity))
            end += ring_bytes(capacity)
        self.size = end


@dataclass(frozen=True, slots=True)
class FabricHandles:
    """What a process needs to attach: the topology, and descriptors that are valid in that process."""

    topology: Topology
    segment: int
    journals: tuple[int, ...]  # one per frontend
    outboxes: tuple[int, ...]  # one per frontend
    doorbells: tuple[int, ...]  # one per process
    frontend_channels: tuple[tuple[int, int], ...] = ()  # one per frontend: where it reads, where the others write


class Fabric:
    """The shared segment as one process sees it. `process`: its number; the supervisor passes -1."""

    def __init__(self, handles: FabricHandles, process: int, incarnation: int) -> None:
        self.topology = handles.topology
        self.process = process
        self.incarnation = incarnation
        self._handles = handles
        self._layout = Layout(handles.topology)
        self._view = segment.attach(handles.segment)

    @classmethod
    def create(cls, topology: Topology, journal_bytes: int, outbox_bytes: int) -> FabricHandles:
        """Create all segments and doorbells (supervisor only)."""
        return FabricHandles(
            topology,
            segment.create(Layout(topology).size),
            tuple(segment.create(journal_bytes) for _ in range(topology.frontends)),
            tuple(segment.create(outbox_bytes) for _ in range(topology.frontends)),
            tuple(doorbell.create() for _ in range(topology.processes)),
            tuple(_channel() for _ in range(topology.frontends)) if topology.frontends > 1 else (),
        )

    @property
    def bell(self) -> int:
        """This process's own doorbell."""
        return self._handles.doorbells[self.process]

    def ring_bell(self, process: int) -> None:
        doorbell.ring(self._handles.doorbells[process])

    def progress(self, process: int) -> Progress:
        return Progress(self._at(self._layout.progress + process * PROGRESS_BYTES, PROGRESS_BYTES))

    def table(self) -> TableReader:
        return TableReader(self._view[:8], self._table_boards())

    def table_writer(self) -> TableWriter:
        return TableWriter(self._view[:8], self._table_boards())

    def board(self) -> BoardWriter:
        """Return the writer of this process's own board."""
        return BoardWriter(self._board_memory(self.process))

    def board_of(self, process: int) -> BoardReader:
        return BoardReader(self._board_memory(process))

    def metrics(self, process: int) -> memoryview:
        """Return the metrics page of a process."""
        return self._at(self._layout.metrics + process * METRICS_BYTES, METRICS_BYTES)

    def desired_states(self) -> memoryview:
        """Return the desired-state words: one u64 per engine."""
        return self._at(self._layout.desired_states, self.topology.engines * 8)

    def restart_orders(self) -> memoryview:
        """Return the restart orders: one u64 per process."""
        return self._at(self._layout.restart_orders, self.topology.processes * 8)

    def events(self, process: int) -> memoryview:
        """Return the event ring of a process."""
        return self._at(self._layout.events + process * EVENT_BYTES, EVENT_BYTES)

    def keys_page(self) -> memoryview:
        """Return the page of the API keys."""
        return self._at(self._layout.keys_page, KEYS_PAGE_BYTES)

    def shutdown(self) -> Shutdown:
        """Return the word that says whether the daemon is shutting down."""
        return Shutdown(self._at(8, 8))

    def writer(self, to: int) -> RingWriter:
        """Return the writer of the ring to process `to`."""
        return RingWriter(self._at(*self._layout.rings[self.process, to]), self.incarnation)

    def reader(self, source: int) -> RingReader:
        """Return the reader of the ring from process `source`."""
        return RingReader(self._at(*self._layout.rings[source, self.process]))

    def journal(self, frontend: int, *, writable: bool = False) -> memoryview:
        return segment.attach(self._handles.journals[frontend], writable=writable)

    def outbox(self, frontend: int) -> memoryview:
        return segment.attach(self._handles.outboxes[frontend])

    def frontend_channels(self) -> tuple[tuple[int, int], ...]:
        """Return the channel of each frontend for connections that others pass to it; none if it is the only one.

        The two descriptors are the ends where it reads and where all others write. They outlive it, so a message
        that it has not read reaches its successor.
        """
        return self._handles.frontend_channels

    def _table_boards(self) -> list[memoryview]:
        return [self._at(self._layout.table + p * BOARD_BYTES, BOARD_BYTES) for p in range(self.topology.processes)]

    def _board_memory(self, process: int) -> memoryview:
        return self._at(self._layout.boards + process * BOARD_BYTES, BOARD_BYTES)

    def _at(self, offset: int, size: int) -> memoryview:
        return self._view[offset : offset + size]


def _channel() -> tuple[int, int]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends[0].detach(), ends[1].detach()


def _page_up(offset: int) -> int:
    return offset + PAGE - 1 & -PAGE
