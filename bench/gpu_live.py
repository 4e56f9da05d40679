"""Benchmarks with real daemons and processes on GPUs: copies between pools, migrations, serving over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import migration, serve
from bench.live import Daemon, serving

READY = "ready"


# -- copies between the pools of two processes


def hold_pool(device: str, nbytes: int) -> None:
    """Run as the peer process: export a pool, print its handle, and hold the pool until stdin ends."""
    import torch

    from daemon.kvpool.cuda_pools import OwnPool, export
    from daemon.kvpool.cudart import CudaRuntime

    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    runtime = CudaRuntime()
    own = OwnPool(memory.data_ptr(), nbytes, runtime.pci_address(memory.device.index))
    print(READY, export(runtime, own).hex(), flush=True)
    sys.stdin.read()


def copy_rates(source: str, destination: str, block_bytes: int, blocks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Measure the seconds to map another process's pool, and the GB/s of pushes of adjacent and scattered blocks.

    `blocks`: numbers of blocks to push.
    """
    import torch

    from daemon.ipc import doorbell
    from daemon.kvpool import cuda_pools, cuda_transport
    from daemon.kvpool.cudart import CudaRuntime

    nbytes = (2 * max(blocks) + 1) * block_bytes
    peer = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", "--hold-pool", destination, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert peer.stdin and peer.stdout
    try:
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=source)
        torch.cuda.synchronize(source)
        word, _, handle = peer.stdout.readline().partition(" ")
        if word != READY or not handle.strip():
            raise RuntimeError(f"no pool on {destination}: {word!r}")
        runtime, device = CudaRuntime(), memory.device.index
        runtime.set_device(device)
        own = cuda_pools.OwnPool(memory.data_ptr(), nbytes, runtime.pci_address(device))
        peer_pool = cuda_pools.decode_pool_handle(bytes.fromhex(handle))
        began = time.perf_counter()
        base = runtime.open_ipc(peer_pool.handle)
        yield {"gib": nbytes / 2**30, "open_seconds": time.perf_counter() - began}
        pool = cuda_pools.CudaPool(1, 1, base, base + peer_pool.offset, peer_pool.nbytes, peer_pool.device)
        transport = cuda_transport.CudaTransport(runtime, own, device, doorbell.create())
        for count in blocks:
            for how, step in (("adjacent", 1), ("scattered", 2)):
                pairs = [(1 + i * step, 1 + i * step) for i in range(count)]
                seconds = statistics.median(_push(transport, pool, pairs, block_bytes) for _ in range(7))
                yield {
                    "blocks": count,
                    "how": how,
                    "seconds": seconds,
                    "gb_per_second": count * block_bytes / seconds / 1e9,
                }
        transport.close()
        runtime.close_ipc(base)
    finally:
        peer.stdin.close()
        peer.wait(30)


def _push(transport: Any, pool: Any, pairs: list[tuple[int, int]], block_bytes: int) -> float:
    began = time.perf_counter()
    transport.push(object(), pool, pairs, block_bytes)
    while not (ended := transport.completed()):
        pass
    seconds = time.perf_counter() - began
    if ended[0].reason or ended[0].nbytes != len(pairs) * block_bytes:
        raise RuntimeError(f"a copy failed: {ended[0]}")
    return seconds


# -- daemons


def moves(
    model: Path, flags: Sequence[str], lengths: Sequence[int], live: int, vocab: int
) -> Iterator[dict[str, Any]]:
    """Measure the cost of migrations of one request between two engines, by its length, as bench.migration does."""
    plan = migration.Plan(lengths, {"live": live, "blocking": live, "recompute": 1}, 1, 1.0)
    with serving(str(model), "--load-format", "dummy", *migration.FLAGS, *flags) as daemon:
        _await_engines(daemon)
        for length in lengths:
            yield migration.measure_length(daemon, plan, [300 + (i * 37) % (vocab - 300) for i in range(length)])


def served(
    model: Path,
    flags: Sequence[str],
    loads: Sequence[tuple[int, int]],
    prompt: int,
    output: int,
    vocab: int,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Run bench.serve's client against `llumd serve`. `loads`: (requests in flight, requests)."""
    with serving(str(model), "--load-format", "dummy", *flags) as daemon:
        _await_engines(daemon)
        for concurrency, requests in loads:
            arguments = serve.parse(
                [
                    "--url",
                    daemon.url,
                    "--model",
                    daemon.model,
                    "--label",
                    "llumd",
                    "--endpoint",
                    "completions",
                    "--prompt-tokens",
                    str(prompt),
                    "--token-ids",
                    "300",
                    str(vocab),
                    "--output-tokens",
                    str(output),
                    "--ignore-eos",
                    "--concurrency",
                    str(concurrency),
                    "--requests",
                    str(requests),
                ]
            )
            report(_run(arguments))


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = asyncio.run(serve.benchmark(arguments, lambda line: print(line, flush=True)))
    run: dict[str, Any] = found["runs"][0]
    if run["failed"]:
        raise RuntimeError(f"{run['failed']} requests failed: {run['errors']}")
    return run


def _await_engines(daemon: Daemon) -> None:
    """Wait until each engine serves and has opened the pools of the others, or cannot."""

    def ready(row: dict[str, Any]) -> bool:
        return "peer_pools" in row and "not_open" not in row["peer_pools"].values()

    asyncio.run(daemon.until("engines that serve", lambda rows: all(map(ready, rows))))
