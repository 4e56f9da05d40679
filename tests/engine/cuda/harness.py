"""A CudaRunner on the CPU, and a stream that delays its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch

from daemon.engine.cuda.mixed_steps import MixedSteps
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.models.loader import open_model
from tests.engine.cpu.harness import runner_settings


def make_cuda_runner(
    path: Path,
    *,
    blocks: int = 400,
    late: bool = False,
    decode_path: Any = "auto",
    gemv: Any = None,
    mixed_steps: MixedSteps | Literal["auto"] = "one pass",
    **options: Any,
) -> CudaRunner:
    """Return a loaded fp32 runner on the CPU. Its pool is full of noise, so that a read of unwritten KV is visible.

    `late`: its stream does no work before an event is waited for.
    """
    settings = runner_settings(**options)
    torch.set_num_threads(1)  # more threads only slow tiny operations down
    config = open_model(path, load_format=settings.load_format)
    runner = CudaRunner(config, settings, device="cpu", decode_path=decode_path, gemv=gemv, mixed_steps=mixed_steps)
    pool = bytearray(runner.pool_spec(blocks).nbytes)
    noise = np.frombuffer(pool, np.uint8)
    noise[:] = np.random.default_rng(0).integers(0x41, 0x43, len(noise), dtype=np.uint8)
    runner.load(memoryview(pool))
    if late:
        runner._stream = LateStream()
    return runner


class LateStream:
    """A stream that does its work as late as possible: when an event after it is waited for.

    So a buffer that is changed too early gives wrong results.
    """

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._submitted = 0
        self._done = 0
        self._running = False

    def submit(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self._submitted += 1

    def record_event(self) -> LateEvent:
        """Return an event. Work that is running and records an event comes before all work submitted after it."""
        return LateEvent(self, self._done if self._running else self._submitted)

    @property
    def num_done(self) -> int:
        return self._done

    def catch_up(self, count: int) -> None:
        while self._done < count:
            self._done += 1
            self._running = True
            self._work.popleft()()
            self._running = False


class LateEvent:
    def __init__(self, stream: LateStream, count: int) -> None:
        self._stream = stream
        self._count = count

    def is_done(self) -> bool:
        return self._stream.num_done >= self._count

    def wait(self) -> None:
        self._stream.catch_up(self._count)


class RandomSteps:
    """Makes steps over a random part of `running`: decodes, and chunks of prompts beside them."""

    def __init__(self, runner: CudaRunner, rng: Random) -> None:
        self.runner = runner
        self.rng = rng
        self.running: list[Request] = []
        self.in_flight: deque[Any] = deque()
        self.unknown = 0  # rows with an input token that was unknown at the launch

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
        self.in_flight.append(self.runner.launch(plan))
        for row in plan.rows:
            self.unknown += row.start == len(row.request.tokens)
            row.request.num_inflight_tokens += row.count
            row.request.num_sampling = row.sample

    def collect(self) -> list[Request]:
        """Collect the oldest step, and return the requests that got a token."""
        ticket = self.in_flight.popleft()
        tokens = iter(self.runner.collect(ticket).tokens)
        sampled = []
        for row in ticket.plan.rows:
            r = row.request
            r.num_inflight_tokens -= row.count
            r.num_computed += row.count
            if row.sample:
                r.tokens.append(next(tokens))
                r.num_sampling = r.in_flight
                sampled.append(r)
        return sampled
