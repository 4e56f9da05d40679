"""KV copies between two pools in shared memory: GB/s, and the slow-down of decode steps during a copy.

    python -m bench.transfer --out bench/results/transfer.json

Blocks have the demo model's size, in the faster arithmetic of the machine; weights are dummies. Steps with and
without a copy are measured in turns, so that a change of the machine's speed affects both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.engine import BLOCK_SIZE, SMOLLM2_135M
from daemon.engine.cpu.runner import CpuRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, RunnerSettings, StepPlan
from daemon.ipc import doorbell, segment
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.kvpool.host_transport import REST, SLICE_BYTES, HostTransport

Pairs = list[tuple[int, int]]
_DECODE_LENGTH = 512  # tokens of each sequence that decodes during the copies
_BLOCKS_OF_DECODE = -(-_DECODE_LENGTH // BLOCK_SIZE)

Segment = Callable[[], memoryview]  # returns a new mapping of the segment


def main() -> None:
    args = _arguments()
    described = machine.describe()
    runner = _runner()
    block_bytes = runner.pool_spec(1).block_bytes
    # Block 0 is no request's. The decodes need blocks of their own, however small the pushes are.
    blocks = 1 + max(*args.blocks, args.batch * _BLOCKS_OF_DECODE)
    source, destination = (_segment(blocks * block_bytes) for _ in range(2))
    own, peer = source(), destination()
    np.frombuffer(own, np.uint8)[:] = 0x3C  # not zeros, so that every page is allocated
    np.frombuffer(peer, np.uint8)[:] = 0
    runner.load(own)
    paces = [(size << 10, rest) for size in args.slice_kib for rest in args.rest]
    with _neighbours(args.neighbours):
        result = {
            "machine": described,
            "block_bytes": block_bytes,
            "arithmetic": runner.arithmetic,
            "neighbours": args.neighbours,
            "memcpy_gb_per_second": _memcpy(own, peer),
            "throughput": [
                _throughput(source, destination, pairs, block_bytes, how, args.repeat)
                for blocks in args.blocks
                for how, pairs in (("adjacent", _adjacent(blocks)), ("scattered", _scattered(blocks)))
            ],
            "slowdown": [
                _slowdown(runner, own, peer, block_bytes, pace, args.batch, args.rounds, args.blocks[-1])
                for pace in paces
            ],
        }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=_integers, default=[16, 64, 256, 1024, 4096], help="sizes of a push, blocks")
    parser.add_argument("--slice-kib", type=_integers, default=[SLICE_BYTES >> 10], help="slices to try, KiB")
    parser.add_argument(
        "--rest", type=_floats, default=[REST], help="rests to try, in seconds for each second of copying"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences that decode during the copies")
    parser.add_argument("--neighbours", type=int, default=0, help="processes that keep other cores and memory busy")
    parser.add_argument("--repeat", type=int, default=5, help="pushes of each kind, of which the median is reported")
    parser.add_argument("--rounds", type=int, default=10, help="turns of steps with and without a copy")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _runner() -> CpuRunner:
    settings = RunnerSettings(
        load_format="dummy", block_size=BLOCK_SIZE, max_num_seqs=64, max_batch_tokens=512, max_model_len=4096
    )
    return CpuRunner(SMOLLM2_135M, settings)


def _segment(nbytes: int) -> Segment:
    fd = segment.create(nbytes)
    return lambda: segment.attach(fd)


@contextmanager
def _neighbours(n: int) -> Iterator[None]:
    processes = [multiprocessing.get_context("spawn").Process(target=_keep_busy, daemon=True) for _ in range(n)]
    for process in processes:
        process.start()
    time.sleep(1.0 if n else 0.0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _keep_busy() -> None:
    """Read memory without end, as a decoding engine does."""
    weights = np.ones(16 << 20, np.int64)
    parent = os.getppid()
    while os.getppid() == parent:
        weights.sum()


def _adjacent(blocks: int) -> Pairs:
    return [(1 + i, 1 + i) for i in range(blocks)]


def _scattered(blocks: int) -> Pairs:
    rng = random.Random(blocks)
    places = [rng.sample(range(1, 1 + blocks), blocks) for _ in range(2)]
    return list(zip(*places, strict=True))


def _memcpy(own: memoryview, peer: memoryview) -> float:
    """Return GB/s of one thread that copies 64 MiB at once, in pages that were touched before."""
    here, there = np.frombuffer(own, np.uint8)[: 64 << 20], np.frombuffer(peer, np.uint8)[: 64 << 20]
    return len(here) / statistics.median(_timed(lambda: np.copyto(there, here)) for _ in range(7)) / 1e9


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _throughput(
    source: Segment, destination: Segment, pairs: Pairs, block_bytes: int, how: str, repeat: int
) -> dict[str, Any]:
    """Return GB/s of whole pushes on an idle engine: into pages that the mapping has not touched, and again."""
    own, bell = source(), doorbell.create()
    _touch(own)
    found: dict[str, Any] = {"blocks": len(pairs), "layout": how}
    for name, rest in (("default", REST), ("no_rest", 0.0)):
        transport = HostTransport(own, bell, rest=rest)
        rates: dict[str, list[float]] = {"first": [], "again": []}
        for _ in range(repeat):
            peer = destination()
            for pages in rates.values():
                pages.append(len(pairs) * block_bytes / _push(transport, bell, peer, pairs, block_bytes) / 1e9)
        found[name] = {f"{pages}_gb_per_second": statistics.median(values) for pages, values in rates.items()}
        transport.close()
    os.close(bell)
    return found


def _touch(pool: memoryview) -> None:
    np.frombuffer(pool, np.uint8)[::4096].sum()


def _push(transport: HostTransport, bell: int, peer: memoryview, pairs: Pairs, block_bytes: int) -> float:
    """Return the seconds until the engine has the completion."""
    start = time.perf_counter()
    transport.push("bench", peer, pairs, block_bytes)
    while not (ended := transport.completed()):
        doorbell.wait(bell, 1.0)
    assert not ended[0].reason, ended
    return time.perf_counter() - start


class _EndlessPushes:
    """A transport that always has two pushes in flight."""

    def __init__(self, transport: HostTransport, peer: memoryview, pairs: Pairs, block_bytes: int) -> None:
        self._transport = transport
        self._work = (peer, pairs, block_bytes)
        self._keys = count()
        self._in_flight: set[Hashable] = set()
        self.copied = 0

    def refill(self) -> None:
        self._collect()
        while len(self._in_flight) < 2:
            self._in_flight.add(key := next(self._keys))
            self._transport.push(key, *self._work)

    def stop(self) -> None:
        for key in self._in_flight:
            self._transport.cancel(key)
        while self._in_flight:
            self._collect()
            time.sleep(0.001)

    def _collect(self) -> None:
        for completion in self._transport.completed():
            assert not completion.reason, completion
            self.copied += completion.nbytes
            self._in_flight.remove(completion.key)


def _slowdown(
    runner: CpuRunner,
    own: memoryview,
    peer: memoryview,
    block_bytes: int,
    pace: tuple[int, float],
    batch: int,
    rounds: int,
    blocks: int,
) -> dict[str, Any]:
    """Measure decode steps alone and during a continuous copy, in turns. Return medians of the rounds' ratios."""
    slice_bytes, rest = pace
    plan, bell = _decodes(batch), doorbell.create()
    transport = HostTransport(own, bell, slice_bytes=slice_bytes, rest=rest)
    pushes = _EndlessPushes(transport, peer, _scattered(blocks), block_bytes)
    alone: list[list[float]] = []
    copying: list[list[float]] = []
    for _ in range(rounds):
        alone.append(_steps(runner, plan, lambda: None))
        pushes.refill()
        copying.append(_steps(runner, plan, pushes.refill))
        pushes.stop()
    transport.close()
    os.close(bell)
    both = list(zip(alone, copying, strict=True))
    gigabytes, seconds = pushes.copied / 1e9, sum(map(sum, copying))
    return {
        "slice_kib": slice_bytes >> 10,
        "rest": rest,
        "batch": batch,
        "gb_per_second": gigabytes / seconds,
        "step_ms": statistics.median(t for steps in alone for t in steps) * 1e3,
        "step_ms_copying": statistics.median(t for steps in copying for t in steps) * 1e3,
        "slowdown_median": statistics.median(statistics.median(b) / statistics.median(a) for a, b in both),
        "slowdown_worst_tenth": statistics.median(_tail(b) / _tail(a) for a, b in both),
        "step_seconds_lost_per_gb": (seconds - sum(map(sum, alone))) / gigabytes,
    }


def _tail(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) * 9 // 10]


def _decodes(batch: int) -> StepPlan:
    each, length = _BLOCKS_OF_DECODE, _DECODE_LENGTH
    params = RequestParams(SamplingParams(max_tokens=1, seed=1, temperature=0.0), arrival=0.0)
    rows = []
    for i in range(batch):
        table = list(range(1 + i * each, 1 + (i + 1) * each))
        tokens = [j % 1000 for j in range(length)]
        rows.append(Row(Request(i, 1, 0, params, tokens, length, block_table=table), length - 1, 1, True))
    return StepPlan(rows, batch)


def _steps(runner: CpuRunner, plan: StepPlan, between: Callable[[], None]) -> list[float]:
    """Return the seconds of each of 20 steps."""
    found = []
    for _ in range(20):
        found.append(_timed(lambda: runner.execute(plan)))
        between()
    return found


if __name__ == "__main__":
    main()
