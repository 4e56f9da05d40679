"""Other engines' KV pools in shared memory: mapped once per incarnation, closed at their engine's death."""

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

from daemon.ipc import doorbell, segment
from daemon.ipc.fabric import Fabric, FabricHandles, Layout, Topology
from daemon.ipc.messages import PoolState
from daemon.ipc.process_table import ProcessFacts, ProcessState, TableReader, TableWriter
from daemon.kvpool.host_pools import HostPools
from tests.e2e.daemon_process import running, wait_for

ROOT = Path(__file__).parents[2]
TOPOLOGY = Topology(frontends=1, engines=2)
SIZE = 3 * 4096
# The source of an engine process that dies with its parent and writes into the pool of engine 1.
ENGINE_SOURCE = """
import ctypes, os, sys, time
from daemon.ipc import doorbell
from daemon.ipc.fabric import Fabric, FabricHandles, Topology
from daemon.kvpool.host_pools import HostPools
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
topology = Topology(1, 2)
table = Fabric(FabricHandles(topology, int(sys.argv[1]), (), (), ()), 0, 1).table()
pools = HostPools(table, topology, os.getppid(), doorbell.create())
while (pool := pools.pool(1)) is None:
    time.sleep(0.01)
pool[5:10] = b"hello"
"""


class FakeSupervisor:
    """This process as the supervisor of two engines: it writes the process table and holds the pools."""

    def __init__(self) -> None:
        self.fd = segment.create(Layout(TOPOLOGY).size)
        self._fabric = Fabric(FabricHandles(TOPOLOGY, self.fd, (), (), ()), -1, 0)
        self._table: TableWriter = self._fabric.table_writer()
        self._incarnations = [0, 0]
        self.pools = [-1, -1]

    def table(self) -> TableReader:
        return self._fabric.table()

    def start(self, engine: int, size: int = SIZE) -> memoryview:
        """Start a new incarnation; return the view of its pool that the engine would have."""
        if self.pools[engine] >= 0:
            os.close(self.pools[engine])
        self.pools[engine] = segment.create(SIZE)
        self._incarnations[engine] += 1
        self._publish(engine, ProcessState.UP, size)
        return segment.attach(self.pools[engine])

    def die(self, engine: int) -> None:
        self._publish(engine, ProcessState.DEAD, SIZE)

    def close(self) -> None:
        for fd in (self.fd, *self.pools):
            if fd >= 0:
                os.close(fd)

    def _publish(self, engine: int, state: ProcessState, size: int) -> None:
        facts = ProcessFacts(state, self._incarnations[engine], pool_fd=self.pools[engine], pool_bytes=size)
        self._table.publish(TOPOLOGY.engine(engine), facts)


@pytest.fixture
def supervisor() -> Iterator[FakeSupervisor]:
    created = FakeSupervisor()
    yield created
    created.close()


@pytest.fixture
def bell() -> Iterator[int]:
    created = doorbell.create()
    yield created
    os.close(created)


@pytest.fixture
def pools(supervisor: FakeSupervisor, bell: int) -> Iterator[HostPools]:
    made = HostPools(supervisor.table(), TOPOLOGY, os.getpid(), bell)
    yield made
    made.close()


def settled(pools: HostPools, engine: int, incarnation: int = 0) -> memoryview | None:
    """Return the pool of an engine once it is open; None once it cannot be opened."""
    pools.refresh()
    wait_for("an attempt to open the pool", lambda: pools.refresh() or pools.states[engine] != PoolState.NOT_OPEN)
    return pools.pool(engine, incarnation)


def same_memory(a: memoryview, b: memoryview) -> bool:
    """Return True if both are views of the same memory."""
    b[0] = (a[0] + 1) % 256
    return a[0] == b[0] and len(a) == len(b)


def test_a_pool_is_mapped_once_and_shares_the_memory_of_its_engine(supervisor, pools):
    assert pools.pool(0) is None  # not started yet
    first, second = supervisor.start(0), supervisor.start(1)
    assert same_memory(settled(pools, 0), first)
    assert same_memory(settled(pools, 1), second)
    assert not same_memory(pools.pool(0), second)
    assert pools.pool(0) is pools.pool(0)


def test_a_child_process_maps_a_pool_that_its_parent_holds(supervisor):
    pool = supervisor.start(1)
    subprocess.run(
        [sys.executable, "-c", ENGINE_SOURCE, str(supervisor.fd)], cwd=ROOT, pass_fds=[supervisor.fd], check=True
    )
    assert bytes(pool[5:10]) == b"hello"


def test_after_a_death_the_pool_is_unmapped_and_the_successors_pool_is_mapped(supervisor, pools):
    supervisor.start(0)
    mapping = weakref.ref(settled(pools, 0).obj)
    supervisor.die(0)
    pools.refresh()
    assert pools.pool(0) is None
    wait_for("the unmapping", lambda: gc.collect() >= 0 and mapping() is None)
    successor = supervisor.start(0)
    assert same_memory(settled(pools, 0), successor)


def test_a_restart_between_two_calls_is_detected(supervisor, pools):
    old = supervisor.start(0)
    assert same_memory(settled(pools, 0, 1), old)
    supervisor.die(0)
    new = supervisor.start(0)
    assert pools.pool(0, 1) is None  # block ids of the predecessor mean nothing in this pool
    assert same_memory(settled(pools, 0, 2), new)
    assert pools.pool(0, 1) is None
    assert pools.pool(0, 3) is None


def test_a_restart_while_the_pool_is_being_mapped_is_detected(supervisor, pools, monkeypatch):
    supervisor.start(0)
    attach = segment.attach

    def restart_then_attach(fd: int) -> memoryview:
        monkeypatch.setattr(segment, "attach", attach)
        supervisor.die(0)
        supervisor.start(0)
        return attach(fd)

    monkeypatch.setattr(segment, "attach", restart_then_attach)
    assert pools.pool(0) is None
    wait_for("the restart", lambda: segment.attach is attach)
    assert same_memory(settled(pools, 0, 2), attach(supervisor.pools[0]))


def test_a_pool_that_cannot_be_mapped_is_logged_once_per_incarnation(supervisor, pools, caplog):
    supervisor.start(0, size=SIZE + 4096)  # not the size of the file
    with caplog.at_level(logging.ERROR):
        assert [settled(pools, 0) for _ in range(3)] == [None] * 3
        assert len(caplog.records) == 1
        assert "engine 0" in caplog.text
    supervisor.die(0)
    successor = supervisor.start(0)
    pools.refresh()
    assert same_memory(settled(pools, 0), successor)


def test_without_access_to_the_supervisor_there_are_no_peers(supervisor, bell, caplog):
    supervisor.start(0)
    dead = subprocess.Popen(["true"])
    dead.wait()
    pools = HostPools(supervisor.table(), TOPOLOGY, dead.pid, bell)
    assert settled(pools, 0) is None
    assert "cannot open" in caplog.text
    pools.close()


def test_two_hundred_restarts_leak_no_descriptor_and_no_mapping(supervisor, pools):
    def count_open() -> tuple[int, int]:
        """Return the number of descriptors and of mappings."""
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("/dev/shm/llumd-")

    supervisor.start(0)
    settled(pools, 0)[0] = 1
    before = count_open()
    for i in range(200):
        supervisor.die(0)
        supervisor.start(0)
        pools.refresh()
        if i % 3:  # otherwise it dies while its pool is being opened
            settled(pools, 0)[0] = 1
    settled(pools, 0)[0] = 1
    wait_for("the unmapping", lambda: count_open() == before)
    pools.close()
    assert count_open() < before


@pytest.mark.e2e
def test_the_daemon_publishes_its_pools(tmp_path, bell):
    """The process table leads to each engine's pool, and to a new pool after a kill."""
    topology = Topology(frontends=1, engines=2)
    with running(tmp_path / "d", "--kv-memory", "1MiB", engine="hash") as daemon:
        pid = daemon.process.pid
        handles = FabricHandles(topology, _fabric_segment(pid, topology), (), (), ())
        directory = HostPools(Fabric(handles, -1, 0).table(), topology, pid, bell)
        pools = [settled(directory, i) for i in range(2)]
        assert [len(pool) for pool in pools] == [1 << 20] * 2
        assert daemon.complete(list(range(100, 164)), max_tokens=20).status_code == 200
        assert any(map(any, pools))  # the KV of the request is in the pools that this test maps
        before = daemon.kill("engine", 1, signal.SIGKILL)
        daemon.await_successor("engine", 1, before)
        assert directory.pool(1, before["incarnation"]) is None
        successor = settled(directory, 1, before["incarnation"] + 1)
        assert successor is not None and successor is not pools[1]
        assert directory.pool(0) is pools[0]
        directory.close()
        os.close(handles.segment)


def _fabric_segment(pid: int, topology: Topology) -> int:
    """Open the shared segment of the daemon whose supervisor is `pid`."""
    size = Layout(topology).size
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "llumd-" in os.readlink(entry) and entry.stat().st_size == size:
            return os.open(entry, os.O_RDWR)
    raise AssertionError(f"no segment of {size} bytes in process {pid}")
