"""A CudaRunner on the CPU: made, and made late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.models.model_config import read_model_config


def make_cuda_runner(path: Path, *, blocks: int = 400, late: bool = False, **options: Any) -> CudaRunner:
    """A loaded fp32 runner on the CPU with a pool of noise: whatever reads KV that was never written shows.

    `late`: its device does nothing before somebody waits for it.
    """
    defaults: dict[str, Any] = {
        "device": "cpu",
        "load_format": "auto",
        "block_size": 16,
        "max_num_seqs": 64,
        "max_batch_tokens": 512,
        "max_model_len": 512,
    }
    settings = defaults | options
    torch.set_num_threads(1)  # tiny operations only wait for one another's threads
    runner = CudaRunner(read_model_config(path, load_format=settings["load_format"]), **settings)
    pool = bytearray(runner.pool_spec(blocks).nbytes)
    noise = np.frombuffer(pool, np.uint8)
    noise[:] = np.random.default_rng(0).integers(0x41, 0x43, len(noise), dtype=np.uint8)
    runner.load(memoryview(pool))
    if late:
        runner._stream = LateStream()
    return runner


class LateStream:
    """Work is done at the last moment: when a mark behind it is waited for. What changes a buffer too early shows."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._submitted = 0
        self._done = 0
        self._working = False

    def submit(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self._submitted += 1

    def mark(self) -> LateMark:
        """Work that makes a mark itself stands before whatever was submitted after it."""
        return LateMark(self, self._done if self._working else self._submitted)

    def catch_up(self, count: int) -> None:
        while self._done < count:
            self._done += 1
            self._working = True
            self._work.popleft()()
            self._working = False


class LateMark:
    def __init__(self, stream: LateStream, count: int) -> None:
        self._stream = stream
        self._count = count

    def wait(self) -> None:
        self._stream.catch_up(self._count)


class RandomSteps:
    """Steps over some of `running`, drawn by `rng`: decodes, and chunks of prompts beside them."""

    def __init__(self, runner: CudaRunner, rng: Random) -> None:
        self.runner = runner
        self.rng = rng
        self.running: list[Request] = []
        self.flying: deque[Any] = deque()
        self.unknown = 0  # rows whose token was not known at the launch

    def plan(self) -> StepPlan:
        live = [r for r in self.running if self.rng.random() < 0.9]
        decodes = [Row(r, r.num_computed + r.num_inflight_tokens, 1, True) for r in live if r.pending == 1]
        chunks, left = [], 128 - len(decodes)
        for r in live:
            n = min(self.rng.randint(1, 40), r.pending, left)
            if r.pending > 1 and n > 0:
                chunks.append(Row(r, r.num_computed + r.num_inflight_tokens, n, n == r.pending))
                left -= n
        return StepPlan([*decodes, *chunks], len(decodes))

    def launch(self, plan: StepPlan) -> None:
        self.flying.append(self.runner.launch(plan))
        for row in plan.rows:
            self.unknown += row.start == len(row.request.tokens)
            row.request.num_inflight_tokens += row.count
            row.request.num_sampling = row.sample

    def collect(self) -> list[Request]:
        """The oldest step; whom it gave a token."""
        ticket = self.flying.popleft()
        drawn = iter(self.runner.collect(ticket).tokens)
        given = []
        for row in ticket.plan.rows:
            r = row.request
            r.num_inflight_tokens -= row.count
            r.num_computed += row.count
            if row.sample:
                r.tokens.append(next(drawn))
                r.num_sampling = r.in_flight
                given.append(r)
        return given
