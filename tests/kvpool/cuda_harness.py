"""One engine on a fake GPU in this process, with peers in processes of their own."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.ipc import doorbell, segment
from daemon.ipc.fabric import Fabric, FabricHandles, Layout
from daemon.ipc.messages import PoolState
from daemon.ipc.process_table import ProcessFacts, ProcessState
from daemon.kvpool.cuda_pools import CudaPool, CudaPools, OwnPool
from daemon.kvpool.cuda_transport import CudaTransport
from daemon.kvpool.cudart import CudaError, CudaRuntime
from daemon.kvpool.transport import Completion, Outcome
from tests.kvpool.device_peer import BLOCK, TOPOLOGY, allocate, connect, engine_fabric, publish, view

ROOT = Path(__file__).parents[2]
BLOCKS = 32
SIZE = BLOCKS * BLOCK
ME, PEER = 0, 1  # engines
NO_PEER_ACCESS, INVALID = 217, 1  # cudaError_t


class PeerProcess:
    """A peer engine in a process of its own."""

    def __init__(self, library: Path, fabric_fd: int, engine: int, incarnation: int) -> None:
        arguments = [str(library), str(fabric_fd), str(TOPOLOGY.engine(engine)), str(incarnation), str(BLOCKS)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvpool.device_peer", *arguments],
            cwd=ROOT, pass_fds=[fabric_fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == b"ready\n"

    def read_pool(self) -> bytes:
        """Return the content of its pool as the peer reads it."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.process.stdout.read(SIZE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class CudaHarness:
    """The supervisor and engine 0 in this process, with real processes as peers. The pool has random bytes."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.fake = ctypes.CDLL(str(library))
        self.fake.fake_permit.argtypes = (ctypes.c_int64,)
        self.fake.fake_lose_context_after.argtypes = (ctypes.c_int64,)
        self._segment = segment.create(Layout(TOPOLOGY).size)
        self._table = Fabric(FabricHandles(TOPOLOGY, self._segment, (), (), ()), -1, 0).table_writer()
        self._peers: list[PeerProcess] = []
        self.bell = doorbell.create()
        self.fabric = engine_fabric(self._segment, TOPOLOGY.engine(ME), 1, self.bell)
        self.tensor = allocate(self.fake, SIZE, device=0)
        self.own_pool = view(self.tensor)
        self.own_pool[:] = random.Random(0).randbytes(SIZE)
        _, pools, self.transport, self.handle = connect(str(library), self.tensor, self.fabric)
        assert isinstance(pools, CudaPools)
        self.pools = pools

    def start_peer(self, engine: int = PEER, incarnation: int = 1) -> PeerProcess:
        """Start a peer that is up and has published its pool."""
        self._peers.append(PeerProcess(self.library, self._segment, engine, incarnation))
        self.publish_state(ProcessState.UP, engine, incarnation)
        return self._peers[-1]

    def publish_state(self, state: ProcessState, engine: int = PEER, incarnation: int = 1) -> None:
        """Publish the state of an engine in the process table."""
        self._table.publish(TOPOLOGY.engine(engine), ProcessFacts(state, incarnation))

    def publish_handle(self, handle: bytes, engine: int = PEER, incarnation: int = 1) -> None:
        """Publish a pool handle on the board of a peer."""
        publish(engine_fabric(self._segment, TOPOLOGY.engine(engine), incarnation, self.bell), handle)

    def num_calls(self, call: str) -> int:
        """Return how often this process has made a CUDA call."""
        return self.fake.fake_count(call.encode())

    def fail_call(self, call: str, code: int, after: int = 0) -> None:
        """Let a CUDA call fail once, after `after` more successes."""
        self.fake.fake_fail(call.encode(), code, after)

    def replace_transport(self, **options: int) -> CudaTransport:
        """Close the transport and create one with other limits."""
        self.transport.close()
        runtime = CudaRuntime(str(self.library))
        own = OwnPool(self.tensor.data_ptr(), SIZE, "0000:1A:00.0")
        self.transport = CudaTransport(runtime, own, 0, self.bell, **options)
        return self.transport

    def slow_call(self, call: str, seconds: float) -> None:
        """Let each call of this name take `seconds`; other calls do not wait for it."""
        self.fake.fake_slow(call.encode(), int(seconds * 1000))

    def await_pool(self, engine: int = PEER, incarnation: int = 0) -> CudaPool | None:
        """Return the pool of a peer once it is open; None once it cannot be opened."""
        end = time.monotonic() + 20
        while True:
            self.pools.refresh()
            if self.pools.states[engine] != PoolState.NOT_OPEN:
                return self.pools.pool(engine, incarnation)
            assert time.monotonic() < end, f"the pool of engine {engine} is not opened"
            doorbell.wait(self.bell, 0.05)

    def await_mapped(self, count: int) -> None:
        """Wait until this process has `count` pools mapped."""
        end = time.monotonic() + 20
        while self.fake.fake_mapped() != count:
            assert time.monotonic() < end, f"{self.fake.fake_mapped()} pools are mapped, not {count}"
            time.sleep(0.002)

    def probed_pool(self, engine: int = PEER) -> CudaPool:
        """Return the pool of a peer after a first push."""
        pool = self.await_pool(engine)
        assert pool is not None
        self.transport.push("first", pool, [(0, 0)], BLOCK)
        assert [end.outcome for end in self.wait_for_completions()] == [Outcome.DONE]
        return pool

    def wait_for_completions(self, count: int = 1) -> list[Completion]:
        """Return the next `count` completions; between two polls wait for the doorbell."""
        ended: list[Completion] = []
        while len(ended) < count:
            ended += self.transport.completed()
            if len(ended) < count:
                assert doorbell.wait(self.bell, 20.0), f"no bell after {ended}"
        return ended

    def close(self) -> None:
        for peer in self._peers:
            peer.kill()
        self.fake.fake_permit(-1)
        self.pools._opener.stop(20.0)
        os.close(self._segment)
        try:
            self.transport.close()
        except CudaError:
            return  # on a device that has failed, threads may still wait and ring the bell later
        os.close(self.bell)


@contextmanager
def open_harness(compiled: Path, folder: Path) -> Iterator[CudaHarness]:
    harness = CudaHarness(Path(shutil.copy(compiled, folder / "libcudart_fake.so")))  # a copy has its own state
    try:
        yield harness
    finally:
        harness.close()


def block(pool: bytes | memoryview, i: int) -> bytes:
    return bytes(pool[i * BLOCK : (i + 1) * BLOCK])


def all_blocks(shift: int = 0) -> list[tuple[int, int]]:
    """Return pairs that move every block by `shift` places."""
    return [(i, (i + shift) % BLOCKS) for i in range(BLOCKS)]
