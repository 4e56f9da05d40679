from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.ipc import segment
from daemon.ipc.fabric import Fabric, FabricHandles, Layout, Topology
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader, TableWriter
from daemon.kvpool import host_pools as room
from daemon.kvpool.host_pools import HostPools
from tests.e2e.daemon_process import running

ROOT = Path(__file__).parents[2]
TOPOLOGY = Topology(frontends=1, engines=2)
SIZE = 3 * 4096
# An engine: bound to its parent's life, it finds the table and writes into the pool of engine 1.
ENGINE = """
import ctypes, os, sys
from daemon.ipc.fabric import Fabric, FabricHandles, Topology
from daemon.kvpool.host_pools import HostPools
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
topology = Topology(1, 2)
table = Fabric(FabricHandles(topology, int(sys.argv[1]), (), ()), 0, 1).table()
HostPools(table, topology, os.getppid()).pool(1)[5:10] = b"hello"
"""


class Box:
    """This process as the supervisor of two engines: it has their table and holds their pools."""

    def __init__(self) -> None:
        self.fd = segment.create(Layout(TOPOLOGY).size)
        self._fabric = Fabric(FabricHandles(TOPOLOGY, self.fd, (), ()), -1, 0)
        self._table: TableWriter = self._fabric.table_writer()
        self._incarnations = [0, 0]
        self.pools = [-1, -1]

    def table(self) -> TableReader:
        return self._fabric.table()

    def start(self, engine: int, size: int = SIZE) -> memoryview:
        """A new incarnation, and its own view of its pool."""
        if self.pools[engine] >= 0:
            os.close(self.pools[engine])
        self.pools[engine] = segment.create(SIZE)
        self._incarnations[engine] += 1
        self._publish(engine, ProcessState.UP, size)
        return segment.attach(self.pools[engine])

    def bury(self, engine: int) -> None:
        self._publish(engine, ProcessState.DEAD, SIZE)

    def close(self) -> None:
        for fd in (self.fd, *self.pools):
            if fd >= 0:
                os.close(fd)

    def _publish(self, engine: int, life: ProcessState, size: int) -> None:
        facts = ProcessFacts(life, self._incarnations[engine], pool_fd=self.pools[engine], pool_bytes=size)
        self._table.publish(TOPOLOGY.engine(engine), facts)


@pytest.fixture
def box() -> Iterator[Box]:
    b = Box()
    yield b
    b.close()


@pytest.fixture
def peers(box: Box) -> HostPools:
    return HostPools(box.table(), TOPOLOGY, os.getpid())


def same(a: memoryview, b: memoryview) -> bool:
    """Whether both are views of one memory."""
    b[0] = (a[0] + 1) % 256
    return a[0] == b[0] and len(a) == len(b)


def test_a_pool_is_mapped_once_and_is_the_peers_own(box, peers):
    assert peers.pool(0) is None  # not born yet
    first, second = box.start(0), box.start(1)
    assert same(peers.pool(0), first)
    assert same(peers.pool(1), second)
    assert not same(peers.pool(0), second)
    assert peers.pool(0) is peers.pool(0)


def test_a_child_maps_what_its_parent_holds(box):
    pool = box.start(1)
    subprocess.run([sys.executable, "-c", ENGINE, str(box.fd)], cwd=ROOT, pass_fds=[box.fd], check=True)
    assert bytes(pool[5:10]) == b"hello"


def test_a_restart_is_noticed_and_the_dead_pool_let_go(box, peers):
    box.start(0)
    mapping = weakref.ref(peers.pool(0).obj)
    box.bury(0)
    peers.refresh()
    gc.collect()
    assert mapping() is None
    assert peers.pool(0) is None
    successor = box.start(0)
    assert same(peers.pool(0), successor)


def test_a_restart_that_nobody_looked_at_is_noticed(box, peers):
    old = box.start(0)
    assert same(peers.pool(0, 1), old)
    box.bury(0)
    new = box.start(0)
    assert peers.pool(0, 1) is None  # what was agreed with the predecessor is void
    assert same(peers.pool(0, 2), new)
    assert peers.pool(0, 3) is None


def test_a_restart_in_the_middle_of_mapping_is_noticed(box, peers, monkeypatch):
    box.start(0)
    attach = segment.attach

    def restart_first(fd: int) -> memoryview:
        monkeypatch.setattr(room.segment, "attach", attach)
        box.bury(0)
        box.start(0)
        return attach(fd)

    monkeypatch.setattr(room.segment, "attach", restart_first)
    assert peers.pool(0) is None
    assert same(peers.pool(0, 2), attach(box.pools[0]))


def test_what_cannot_be_mapped_is_said_once_an_incarnation(box, peers, caplog):
    box.start(0, size=SIZE + 4096)  # not what the descriptor has
    with caplog.at_level(logging.ERROR):
        assert [peers.pool(0) for _ in range(3)] == [None] * 3
        assert len(caplog.records) == 1
        assert "engine 0" in caplog.text
    box.bury(0)
    successor = box.start(0)
    assert same(peers.pool(0), successor)


def test_a_supervisor_that_cannot_be_looked_into_means_no_peers(box, caplog):
    box.start(0)
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert HostPools(box.table(), TOPOLOGY, gone.pid).pool(0) is None
    assert "cannot map" in caplog.text


def test_two_hundred_restarts_leave_no_descriptor_and_no_mapping(box, peers):
    def open_now() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("/dev/shm/llumd-")

    box.start(0)
    peers.pool(0)[0] = 1
    before = open_now()
    for _ in range(200):
        box.bury(0)
        box.start(0)
        peers.pool(0)[0] = 1
    assert open_now() == before
    peers.close()
    assert open_now() < before


def test_the_daemon_publishes_its_pools(tmp_path):
    """The supervisor's table leads to each engine's pool, and to another one after a kill."""
    topology = Topology(frontends=1, engines=2)
    with running(tmp_path / "d", "--kv-memory", "1MiB", engine="hash") as daemon:
        supervisor = daemon.process.pid
        handles = FabricHandles(topology, _fabric_segment(supervisor, topology), (), ())
        found = HostPools(Fabric(handles, -1, 0).table(), topology, supervisor)
        pools = [found.pool(i) for i in range(2)]
        assert [len(pool) for pool in pools] == [1 << 20] * 2
        assert daemon.complete(list(range(100, 164)), max_tokens=20).status_code == 200
        assert any(map(any, pools))  # KV was written where we look
        before = daemon.kill("engine", 1, signal.SIGKILL)
        daemon.await_successor("engine", 1, before)
        assert found.pool(1, before["incarnation"]) is None
        assert found.pool(1, before["incarnation"] + 1) is not pools[1]
        assert found.pool(0) is pools[0]
        os.close(handles.segment)


def _fabric_segment(pid: int, topology: Topology) -> int:
    size = Layout(topology).size
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "llumd-" in os.readlink(entry) and entry.stat().st_size == size:
            return os.open(entry, os.O_RDWR)
    raise AssertionError(f"no segment of {size} bytes in process {pid}")
