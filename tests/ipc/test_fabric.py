"""The layout of the shared segment, and the views that processes have of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.ipc import doorbell, metrics_page
from daemon.ipc.board import BOARD_BYTES
from daemon.ipc.fabric import COORDINATOR, EVENT_BYTES, METRICS_BYTES, Fabric, FabricHandles, Layout, Topology
from daemon.ipc.journal import Journal
from daemon.ipc.keys_page import KEYS_PAGE_BYTES
from daemon.ipc.messages import EngineState
from daemon.ipc.process_table import PROGRESS_BYTES, ProcessFacts, ProcessState
from daemon.ipc.ring import PAGE
from tests.ipc.factories import fabric_handles

topologies = st.builds(Topology, st.integers(1, 16), st.integers(1, 64))


@given(topologies)
def test_no_two_areas_overlap_and_all_are_aligned(topology: Topology):
    layout, n = Layout(topology), topology.processes
    areas = [
        (0, PAGE),
        *((layout.progress + p * PROGRESS_BYTES, PROGRESS_BYTES) for p in range(n)),
        *((layout.table + p * BOARD_BYTES, BOARD_BYTES) for p in range(n)),
        *((layout.boards + p * BOARD_BYTES, BOARD_BYTES) for p in range(n)),
        *((layout.metrics + p * METRICS_BYTES, METRICS_BYTES) for p in range(n)),
        (layout.desired_states, 8 * topology.engines),
        *((layout.events + p * EVENT_BYTES, EVENT_BYTES) for p in range(n)),
        (layout.keys_page, KEYS_PAGE_BYTES),
        *layout.rings.values(),
    ]
    end = 0
    for start, size in sorted(areas):
        assert start >= end
        assert start % 64 == 0
        end = start + size
    assert end == layout.size
    assert all(start % PAGE == 0 and size % PAGE == 0 for start, size in layout.rings.values())


@given(topologies)
def test_process_numbers_and_roles(topology: Topology):
    numbers = [COORDINATOR, *map(topology.frontend, range(topology.frontends))]
    numbers += map(topology.engine, range(topology.engines))
    assert numbers == list(range(topology.processes))
    assert topology.role(COORDINATOR) == ("coordinator", 0)
    assert [topology.role(topology.frontend(k)) for k in range(topology.frontends)] == [
        ("frontend", k) for k in range(topology.frontends)
    ]
    assert topology.role(topology.engine(topology.engines - 1)) == ("engine", topology.engines - 1)
    f, e = topology.frontends, topology.engines
    assert len(topology.rings()) == f + e + 2 * f * e + e * (e - 1)


def test_every_metrics_table_fits_a_page():
    assert max(metrics_page.FRONTEND.nbytes, metrics_page.ENGINE.nbytes) <= METRICS_BYTES


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    with fabric_handles(2, 64) as created:
        yield created


def test_every_ring_of_a_large_daemon_carries_its_own_records(handles: FabricHandles):
    topology = handles.topology
    views = [Fabric(handles, p, incarnation=100 + p) for p in range(topology.processes)]
    for a, b in topology.rings():
        assert views[a].writer(b).put(b"%d-%d" % (a, b), 100 + b)
    for a, b in topology.rings():
        reader = views[b].reader(a)
        record = reader.read()
        assert (bytes(record.payload), record.sender, record.receiver) == (b"%d-%d" % (a, b), 100 + a, 100 + b)
        assert reader.read() is None


def test_a_ring_that_does_not_exist_raises_key_error(handles: FabricHandles):
    engine = Fabric(handles, handles.topology.engine(0), 1)
    with pytest.raises(KeyError):
        engine.writer(handles.topology.engine(0))
    with pytest.raises(KeyError):
        engine.writer(COORDINATOR)


def test_each_process_has_its_own_board_row_progress_page_and_bell(handles: FabricHandles):
    topology = handles.topology
    views = [Fabric(handles, p, 1) for p in range(topology.processes)]
    supervisor = Fabric(handles, -1, 0)
    table = supervisor.table_writer()
    for p, view in enumerate(views):
        view.board().publish(b"facts %d" % p)
        view.progress(p).enter(EngineState.SERVING, p + 1, 10)
        view.metrics(p)[:] = bytes([p]) * METRICS_BYTES
        table.publish(p, ProcessFacts(ProcessState.UP, p + 1, pid=1000 + p))
    supervisor.ring_bell(5)
    rows = views[3].table()
    assert rows.refresh()
    for p in range(topology.processes):
        assert views[0].board_of(p).read() == (1, b"facts %d" % p)
        assert supervisor.progress(p).incarnation == p + 1
        assert bytes(views[1].metrics(p)) == bytes([p]) * METRICS_BYTES
        assert (rows.rows[p].incarnation, rows.rows[p].pid) == (p + 1, 1000 + p)
        assert doorbell.clear(views[p].bell) == (p == 5)


def test_a_journal_is_read_only_except_for_its_owner(handles: FabricHandles):
    owner = Fabric(handles, handles.topology.frontend(1), 1)
    engine = Fabric(handles, handles.topology.engine(0), 1)
    Journal(owner.journal(1, writable=True))
    shared = engine.journal(1)
    assert shared.readonly
    assert len(shared) == 1 << 20
