"""Chunks alone, and steps of decodes with a chunk: in one pass, which shares the products, against two passes."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from bench import gpu_profile
from bench.gpu_model import LLAMA_8B, LLAMA_135M, TINY, model_config_of
from bench.gpu_steps import RunnerOptions, decoding_requests, make_runner
from daemon.engine.cuda.mixed_steps import MixedSteps
from daemon.engine.cuda.runner import IN_FLIGHT, CudaRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.models.model_config import ModelConfig


class Loads(NamedTuple):
    """`context`: tokens of each decoding sequence. `chunks`: tokens of the chunks alone. `mixed`: number of decodes,
    and tokens of the chunk beside them. `steps`: in each of `rounds`."""

    rounds: int
    steps: int
    context: int
    chunks: tuple[int, ...]
    mixed: tuple[tuple[int, int], ...]


FULL = Loads(2, 8, 1024, (16, 64, 256, 512), ((1, 512), (64, 256), (64, 512), (64, 1984), (64, 2048), (256, 512)))
FEW = Loads(2, 8, 1024, (64, 512), ((1, 64), (64, 64), (64, 512)))
DRY = Loads(1, 4, 64, (16, 64), ((1, 40), (4, 100)))


class StepTimes(NamedTuple):
    """Median seconds of a step while the next one is launched, and of the launch alone."""

    step: float
    launch: float


def measure(options: RunnerOptions, directory: Path, report: Callable[..., None], *, dry: bool) -> None:
    """Measure a model that waits for its weights and one that waits for the host; with `dry` a tiny one.

    `directory`: for the models' shapes. Each figure goes to ``report(what, value, unit, **more)``.
    """
    models = {"tiny": (TINY, DRY)} if dry else {"8B": (LLAMA_8B, FULL), "135M": (LLAMA_135M, FEW)}
    for name, (shape, loads) in models.items():
        _measure(name, model_config_of(shape, directory / name), options, loads, report)
        gc.collect()  # the pool of a model takes nearly all memory


def _measure(
    name: str, config: ModelConfig, options: RunnerOptions, loads: Loads, report: Callable[..., None]
) -> None:
    rows = 1 + max(decodes for decodes, _ in loads.mixed)
    options = options._replace(max_num_seqs=rows, max_batch_tokens=max(tokens for _, tokens in loads.mixed))
    runner = make_runner(config, options)
    if found := runner.mixed_seconds:
        once, twice = found["one pass"] * 1e3, found["two passes"] * 1e3
        report(f"{name}: one pass, measured at load", once / twice, "of two", one_ms=once, two_ms=twice)
    for tokens in loads.chunks:
        times = _times(runner, StepPlan([_chunk_row(runner, options, tokens)], 0), loads.steps)
        more = _idle(runner, options, tokens, times.step)
        report(f"{name}: chunk of {tokens}", times.step * 1e3, "ms", launch_ms=times.launch * 1e3, **more)
    for decodes, tokens in loads.mixed:
        one, two = _compare(runner, _mixed_plan(runner, options, decodes, loads.context, tokens), loads)
        launches = {"one_launch_ms": one.launch * 1e3, "two_launch_ms": two.launch * 1e3}
        steps = {"one_ms": one.step * 1e3, "two_ms": two.step * 1e3}
        report(f"{name}: {decodes} + {tokens}, one pass", one.step / two.step, "of two", **steps, **launches)


def _idle(runner: CudaRunner, options: RunnerOptions, tokens: int, step: float) -> dict[str, Any]:
    """Return how long the kernels of a chunk take, and the share of `step` seconds in which none runs."""
    if options.device == "cpu":
        return {}
    kernels = sum(share.us for share in gpu_profile.prefill(runner, options, tokens)) / 1e6
    return {"kernels_ms": kernels * 1e3, "idle": max(0.0, 1 - kernels / step)} if kernels else {}


def _compare(runner: CudaRunner, plan: StepPlan, loads: Loads) -> list[StepTimes]:
    """Return the times in one pass and in two. They take turns, so that a temporary slowdown affects both."""
    ways: tuple[MixedSteps, ...] = get_args(MixedSteps)
    rounds: dict[MixedSteps, list[StepTimes]] = {way: [] for way in ways}
    usual = runner._mixed_steps
    try:
        for way in ways * loads.rounds:
            runner._mixed_steps = way
            rounds[way].append(_times(runner, plan, loads.steps))
    finally:
        runner._mixed_steps = usual
    return [StepTimes(*map(statistics.median, zip(*rounds[way], strict=True))) for way in ways]


def _times(runner: CudaRunner, plan: StepPlan, count: int) -> StepTimes:
    """Run the same step `count` times. Each time it writes the same KV."""
    in_flight: deque[Any] = deque()
    launches, ends = [], []
    for _ in range(count):
        start = time.perf_counter()
        in_flight.append(runner.launch(plan))
        launches.append(time.perf_counter() - start)
        if len(in_flight) == IN_FLIGHT:
            runner.collect(in_flight.popleft())
            ends.append(time.perf_counter())
    while in_flight:
        runner.collect(in_flight.popleft())
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return StepTimes(statistics.median(steps), statistics.median(launches))


def _mixed_plan(runner: CudaRunner, options: RunnerOptions, decodes: int, context: int, tokens: int) -> StepPlan:
    requests = decoding_requests(runner, decodes, context, 1, options.block_size)
    rows = [Row(request, context - 1, 1, True) for request in requests]
    rows.append(_chunk_row(runner, options, tokens, behind=requests))
    return StepPlan(rows, decodes)


def _chunk_row(runner: CudaRunner, options: RunnerOptions, tokens: int, behind: list[Request] | None = None) -> Row:
    """Return a prompt in one chunk. Its blocks are those after the blocks of the requests `behind`.

    Raises RuntimeError if the pool is too small.
    """
    [request] = decoding_requests(runner, 1, tokens, 1, options.block_size)
    first = behind[-1].block_table[-1] if behind else 0
    request.block_table = [first + block for block in request.block_table]
    if (last := request.block_table[-1]) >= runner.num_blocks:
        raise RuntimeError(f"{last + 1} blocks are needed and the pool has {runner.num_blocks}")
    return Row(request, 0, tokens, True)
