"""The shared segment that joins all processes: where everything lies in it, and each process's ends.

One segment holds process table, progress words, boards, statistics and rings; `Layout` computes every
offset from the topology alone. Journals and KV pools are segments of their own. A lane is a ring for one
directed pair that talks; a process finds its peers by their number: 0 coordinator, then frontends, then engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from daemon.ipc import doorbell, segment
from daemon.ipc.board import SLOT_BYTES, BoardReader, BoardWriter
from daemon.ipc.process_table import PROGRESS_BYTES, Progress, TableReader, TableWriter
from daemon.ipc.ring import PAGE, RingReader, RingWriter, ring_bytes

COORDINATOR = 0

COMMAND_RING = 256 << 10  # frontend -> engine: prompts go by reference, so records are small
OUTPUT_RING = 1 << 20  # engine -> frontend: a step's tokens and logprobs
ADVICE_RING = 64 << 10  # coordinator -> frontend and engine
PEER_RING = 256 << 10  # engine -> engine: a reservation names a block for each 16 tokens
METRICS_BYTES = 16 << 10  # statistics page of one process
EVENT_BYTES = 64 << 10  # event log of one process


class Topology(NamedTuple):
    """How many there are of each."""

    frontends: int
    engines: int

    @property
    def processes(self) -> int:
        return 1 + self.frontends + self.engines

    def frontend(self, k: int) -> int:
        """Process number of frontend k."""
        return 1 + k

    def engine(self, i: int) -> int:
        """Process number of engine i."""
        return 1 + self.frontends + i

    def role(self, process: int) -> tuple[str, int]:
        """("coordinator" | "frontend" | "engine", index) of a process number."""
        if process == COORDINATOR:
            return "coordinator", 0
        if process <= self.frontends:
            return "frontend", process - 1
        return "engine", process - 1 - self.frontends

    def lanes(self) -> dict[tuple[int, int], int]:
        """Every directed pair that talks, with the capacity of its ring."""
        found: dict[tuple[int, int], int] = {}
        for i in range(self.engines):
            found[COORDINATOR, self.engine(i)] = ADVICE_RING
            for j in range(self.engines):
                if i != j:
                    found[self.engine(i), self.engine(j)] = PEER_RING
        for k in range(self.frontends):
            found[COORDINATOR, self.frontend(k)] = ADVICE_RING
            for i in range(self.engines):
                found[self.frontend(k), self.engine(i)] = COMMAND_RING
                found[self.engine(i), self.frontend(k)] = OUTPUT_RING
        return found


class Layout:
    """Byte offsets in the fabric segment. Page 0 starts with the table's generation word."""

    def __init__(self, topology: Topology) -> None:
        n = topology.processes
        self.progress = PAGE
        self.table = _page_up(self.progress + n * PROGRESS_BYTES)
        self.boards = self.table + n * SLOT_BYTES
        self.metrics = self.boards + n * SLOT_BYTES
        self.desired_states = _page_up(self.metrics + n * METRICS_BYTES)
        self.events = _page_up(self.desired_states + topology.engines * 8)
        end = _page_up(self.events + n * EVENT_BYTES)
        self.lanes: dict[tuple[int, int], tuple[int, int]] = {}
        for pair, capacity in topology.lanes().items():
            self.lanes[pair] = (end, ring_bytes(capacity))
            end += ring_bytes(capacity)
        self.size = end


@dataclass(frozen=True, slots=True)
class FabricHandles:
    """What a child is given: the topology and descriptors valid in its own process."""

    topology: Topology
    segment: int
    journals: tuple[int, ...]  # one a frontend
    doorbells: tuple[int, ...]  # one a process


class Fabric:
    """One process's view of the shared segment. The supervisor passes process -1."""

    def __init__(self, handles: FabricHandles, process: int, incarnation: int) -> None:
        self.topology = handles.topology
        self.process = process
        self.incarnation = incarnation
        self._handles = handles
        self._layout = Layout(handles.topology)
        self._view = segment.attach(handles.segment)

    @classmethod
    def create(cls, topology: Topology, journal_bytes: int) -> FabricHandles:
        """Allocate every segment and doorbell (supervisor only)."""
        return FabricHandles(
            topology,
            segment.create(Layout(topology).size),
            tuple(segment.create(journal_bytes) for _ in range(topology.frontends)),
            tuple(doorbell.create() for _ in range(topology.processes)),
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
        return TableReader(self._view[:8], self._table_slots())

    def table_writer(self) -> TableWriter:
        return TableWriter(self._view[:8], self._table_slots())

    def board(self) -> BoardWriter:
        """This process's own slot."""
        return BoardWriter(self._board_slot(self.process))

    def board_of(self, process: int) -> BoardReader:
        return BoardReader(self._board_slot(process))

    def metrics(self, process: int) -> memoryview:
        """The statistics page of a process."""
        return self._at(self._layout.metrics + process * METRICS_BYTES, METRICS_BYTES)

    def desired_states(self) -> memoryview:
        """One u64 an engine: the state that the coordinator wants it in."""
        return self._at(self._layout.desired_states, self.topology.engines * 8)

    def events(self, process: int) -> memoryview:
        """The event log of a process."""
        return self._at(self._layout.events + process * EVENT_BYTES, EVENT_BYTES)

    def writer(self, to: int) -> RingWriter:
        """The producing end of the lane to process `to`."""
        return RingWriter(self._at(*self._layout.lanes[self.process, to]), self.incarnation)

    def reader(self, source: int) -> RingReader:
        """The consuming end of the lane from process `source`."""
        return RingReader(self._at(*self._layout.lanes[source, self.process]))

    def journal(self, frontend: int, *, writable: bool = False) -> memoryview:
        return segment.attach(self._handles.journals[frontend], writable=writable)

    def _table_slots(self) -> list[memoryview]:
        return [self._at(self._layout.table + p * SLOT_BYTES, SLOT_BYTES) for p in range(self.topology.processes)]

    def _board_slot(self, process: int) -> memoryview:
        return self._at(self._layout.boards + process * SLOT_BYTES, SLOT_BYTES)

    def _at(self, offset: int, size: int) -> memoryview:
        return self._view[offset : offset + size]


def _page_up(offset: int) -> int:
    return offset + PAGE - 1 & -PAGE
