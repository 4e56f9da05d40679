"""An engine's end of CUDA IPC in a process of its own: `device_peer.py LIBRARY SEGMENT PROCESS INCARNATION BLOCKS`.

It publishes its pool and answers each line on stdin with the pool's bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace

from daemon.ipc import doorbell
from daemon.ipc.fabric import Fabric, FabricHandles, Topology
from daemon.ipc.messages import EngineFacts, EngineState, encode
from daemon.kvpool.cuda_pools import CudaKv, for_runner
from daemon.kvpool.cudart import CudaRuntime

TOPOLOGY = Topology(frontends=1, engines=3)
BLOCK = 4096
AHEAD = 512  # bytes before the pool in its allocation


def memory(library: ctypes.CDLL, nbytes: int, device: int) -> SimpleNamespace:
    """What for_runner asks of a tensor: `nbytes` on the fake device, zeros, not at the start of their allocation."""
    pointer = ctypes.c_void_p()
    assert library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes + AHEAD)) == 0
    at = pointer.value + AHEAD
    return SimpleNamespace(device=SimpleNamespace(index=device), data_ptr=lambda: at, numel=lambda: nbytes)


def view(tensor: SimpleNamespace) -> memoryview:
    return memoryview((ctypes.c_char * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


def fabric(segment: int, process: int, incarnation: int, bell: int) -> Fabric:
    return Fabric(FabricHandles(TOPOLOGY, segment, (), (bell,) * TOPOLOGY.processes), process, incarnation)


def join(library: str, tensor: SimpleNamespace, end: Fabric) -> CudaKv:
    return for_runner(end, tensor, CudaRuntime(library, driver=library))


def publish(end: Fabric, handle: bytes) -> None:
    zeros = (0,) * 10
    facts = EngineFacts(end.incarnation, EngineState.SERVING, 0, 0.0, *zeros, 0.0, 0.0, [], pool_handle=handle)
    end.board().publish(encode(facts))


def main() -> None:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # die with the test
    path, *numbers = sys.argv[1:]
    segment, process, incarnation, blocks = map(int, numbers)
    end = fabric(segment, process, incarnation, doorbell.create())
    tensor = memory(ctypes.CDLL(path), blocks * BLOCK, device=1)
    publish(end, join(path, tensor, end).handle)
    os.write(1, b"ready\n")
    for _ in sys.stdin:
        pool = view(tensor)
        while pool:
            pool = pool[os.write(1, pool) :]


if __name__ == "__main__":
    main()
