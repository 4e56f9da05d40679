"""A peer engine on a fake GPU: `device_peer.py LIBRARY SEGMENT PROCESS INCARNATION BLOCKS`.

It publishes its pool and answers each line on stdin with the pool's bytes. The test imports its functions, too.
"""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace

from daemon.ipc import doorbell
from daemon.ipc.fabric import Fabric, FabricHandles, Topology
from daemon.ipc.messages import EngineFacts, EngineState, encode
from daemon.kvpool import cuda_transport
from daemon.kvpool.cudart import CudaRuntime
from daemon.kvpool.link import KvLink

TOPOLOGY = Topology(frontends=1, engines=3)
BLOCK = 4096
OFFSET = 512  # bytes before the pool in its allocation


def allocate(library: ctypes.CDLL, nbytes: int, device: int) -> SimpleNamespace:
    """Allocate `nbytes` zeros on the fake device, not at the start of their allocation; they act as a tensor."""
    pointer = ctypes.c_void_p()
    assert library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes + OFFSET)) == 0
    address = pointer.value + OFFSET
    return SimpleNamespace(device=SimpleNamespace(index=device), data_ptr=lambda: address, numel=lambda: nbytes)


def view(tensor: SimpleNamespace) -> memoryview:
    """Return the bytes of `tensor`."""
    return memoryview((ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


def engine_fabric(segment: int, process: int, incarnation: int, bell: int) -> Fabric:
    """Return the shared segment as an engine sees it; all doorbells are `bell`."""
    return Fabric(FabricHandles(TOPOLOGY, segment, (), (), (bell,) * TOPOLOGY.processes), process, incarnation)


def connect(library: str, tensor: SimpleNamespace, fabric: Fabric) -> KvLink:
    """Connect the pool `tensor` with its peers' pools through the fake runtime."""
    runtime = CudaRuntime(library, driver=library)
    return cuda_transport.connect(fabric, tensor, tensor.numel() // BLOCK, runtime)


def publish(fabric: Fabric, handle: bytes) -> None:
    """Publish `handle` on the engine's board."""
    zeros = (0,) * 10
    facts = EngineFacts(fabric.incarnation, EngineState.SERVING, 0, 0.0, *zeros, 0.0, 0.0, [], pool_handle=handle)
    fabric.board().publish(encode(facts))


def main() -> None:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # die with the test
    path, *numbers = sys.argv[1:]
    segment, process, incarnation, blocks = map(int, numbers)
    fabric = engine_fabric(segment, process, incarnation, doorbell.create())
    tensor = allocate(ctypes.CDLL(path), blocks * BLOCK, device=1)
    publish(fabric, connect(path, tensor, fabric).handle)
    os.write(1, b"ready\n")
    for _ in sys.stdin:
        pool = view(tensor)
        while pool:
            pool = pool[os.write(1, pool) :]


if __name__ == "__main__":
    main()
