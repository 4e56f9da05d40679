"""Step times of the CUDA engine, by the host's clock and by device events around each decode pass."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from bench.gpu_peaks import synchronize
from daemon.engine.cuda.product_choice import LIMITS, Limits
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.runner import Row, RunnerSettings, StepPlan
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager
from daemon.models.model_config import ModelConfig

# By item size: integer dtype, mask of the random bits (sign, mantissa and last bit of the exponent), and bits to set.
_NOISE = {
    1: (torch.int8, ~0x78 | 0x08, 0x20),
    2: (torch.int16, ~0x7F80 | 0x80, 0x3E00),
    4: (torch.int32, ~0x7F800000 | 0x800000, 0x3E000000),
}


class RunnerOptions(NamedTuple):
    """Options of a runner. `kv_blocks`: 0 for as many as fit."""

    device: str
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int = 16
    kv_dtype: str = "auto"
    prefill: Literal["fa2", "fa3"] = "fa2"
    kv_blocks: int = 0
    product_limits: Limits | None = LIMITS


def make_runner(config: ModelConfig, options: RunnerOptions) -> CudaRunner:
    """Return a loaded runner with dummy weights and noise as KV: the clock of a GPU depends on the data it moves."""
    item = 1 if options.kv_dtype == "fp8" else 2 if options.device != "cpu" else 4
    block = 2 * config.num_layers * options.block_size * config.num_kv_heads * config.head_dim * item
    settings = RunnerSettings(
        kv_dtype=options.kv_dtype,
        load_format="dummy",
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_batch_tokens=options.max_batch_tokens,
        max_model_len=options.max_model_len,
        kv_memory=options.kv_blocks * block,
    )
    runner = CudaRunner(
        config,
        settings,
        device=options.device,
        prefill=options.prefill,
        product_limits=options.product_limits,
    )
    runner.load()
    fill_with_noise(runner.pool_memory, item)
    synchronize(options.device)
    return runner


def fill_with_noise(pool: torch.Tensor, item: int) -> None:
    """Fill `pool` with numbers of `item` bytes, of both signs, with absolute values from 2^-3 to 2^-1."""
    dtype, random_bits, set_bits = _NOISE[item]
    for chunk in pool.view(dtype).split(1 << 28):
        chunk.random_(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        chunk.bitwise_and_(random_bits).bitwise_or_(set_bits)


class DecodeTimer:
    """Context manager that records when the device begins and ends each decode pass of a runner."""

    def __init__(self, runner: CudaRunner, device: str) -> None:
        self._runner = runner
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> DecodeTimer:
        self._compute = self._runner._compute_decodes

        def timed(bucket: int) -> None:
            start = self._now()
            self._compute(bucket)
            self._pairs.append((start, self._now()))

        self._runner._compute_decodes = timed
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner._compute_decodes = self._compute
        synchronize(self._device)

    def busy(self) -> list[float]:
        """Return the seconds of each pass."""
        return [self._seconds(*pair) for pair in self._pairs]

    def idle(self) -> list[float]:
        """Return the seconds from the end of each pass to the start of the next one."""
        return [self._seconds(one[1], next_[0]) for one, next_ in itertools.pairwise(self._pairs)]

    def _now(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, a: Any, b: Any) -> float:
        return float(b - a) if self._device == "cpu" else float(a.elapsed_time(b)) / 1e3


class StepTimes(NamedTuple):
    """Mean seconds of a step. `busy`: of its decode pass; `idle`: between decode passes, including all copies."""

    step: float
    busy: float
    idle: float


def decode(
    runner: CudaRunner, options: RunnerOptions, batch: int, context: int, steps: int, *, overlap: bool, graphs: bool
) -> StepTimes:
    """Time decode steps of `batch` sequences with `context` tokens or more, over KV of noise.

    Raises RuntimeError if the pool is too small.
    """
    requests = decoding_requests(runner, batch, context, steps + 2, options.block_size)
    if (last := requests[-1].block_table[-1]) >= runner.num_blocks:
        raise RuntimeError(f"{last + 1} blocks are needed and the pool has {runner.num_blocks}")
    compute = runner._compute_decodes
    if not graphs:
        runner._compute_decodes = runner._forward.decode
    try:
        _take_steps(runner, requests, context, 0, 3, overlap)
        synchronize(options.device)
        with DecodeTimer(runner, options.device) as timer:
            times = _take_steps(runner, requests, context, 3, steps, overlap)
    finally:
        runner._compute_decodes = compute
    return StepTimes(*map(statistics.fmean, (times, timer.busy(), timer.idle())))


def decoding_requests(
    runner: CudaRunner, batch: int, context: int, extra_tokens: int, block_size: int
) -> list[Request]:
    """Return `batch` requests with `context` tokens, and blocks for `extra_tokens` more.

    The content of the pool stands for their KV, which a step reads for all tokens but the last.
    """
    each = -(-(context + extra_tokens) // block_size)
    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0, temperature=0.0), 0.0)
    prompts = random_prompts(batch, context, runner.vocab_size)
    return [
        Request(i + 1, 1, 0, params, prompt, context, block_table=list(range(1 + i * each, 1 + (i + 1) * each)))
        for i, prompt in enumerate(prompts)
    ]


def _take_steps(
    runner: CudaRunner, requests: Sequence[Request], context: int, first: int, stop: int, overlap: bool
) -> list[float]:
    """Run steps [first, stop). Return the seconds from each result to the next."""
    in_flight: deque[Any] = deque()
    ends = []

    def collect() -> None:
        sampled = runner.collect(in_flight.popleft()).tokens
        for request, token in zip(requests, sampled, strict=True):
            request.tokens.append(token)
        ends.append(time.perf_counter())

    for i in range(first, stop):
        rows = [Row(request, context - 1 + i, 1, True) for request in requests]
        in_flight.append(runner.launch(StepPlan(rows, len(rows))))
        if len(in_flight) == (2 if overlap else 1):
            collect()
    while in_flight:
        collect()
    times = [b - a for a, b in itertools.pairwise(ends)]
    return times[:-1] if overlap else times  # while the last step ran, no other was launched


def prefill(runner: CudaRunner, options: RunnerOptions, tokens: int, repeat: int) -> float:
    """Return the median seconds of a prompt of `tokens` tokens in one chunk, from launch to its first token."""
    [request] = decoding_requests(runner, 1, tokens, 1, options.block_size)
    plan = StepPlan([Row(request, 0, tokens, True)], 0)
    return _median(lambda: runner.execute(plan), repeat)


def _median(work: Callable[[], Any], repeat: int) -> float:
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class OfflineResult(NamedTuple):
    """Result of a batch of prompts with the real scheduler.

    `idle_share`: median share of a decode step without prefill in which the device waits.
    """

    seconds: float
    output_tokens: int
    idle_share: float


def offline(
    runner: CudaRunner, options: RunnerOptions, prompts: Sequence[list[int]], output: int, *, overlap: bool
) -> OfflineResult:
    """Generate `output` tokens for each prompt, greedily."""
    scheduler = Scheduler(
        BlockManager(runner.num_blocks, options.block_size),
        max_num_seqs=options.max_num_seqs,
        max_batch_tokens=options.max_batch_tokens,
        max_model_len=options.max_model_len,
        eos_token_ids=(),
    )
    params = SamplingParams(max_tokens=output, seed=0, temperature=0.0)
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(i, 1, 0, RequestParams(params, float(i)), list(prompt), len(prompt)))
    pipeline = Pipeline(runner, overlap=overlap)
    start = time.perf_counter()
    with DecodeTimer(runner, options.device) as timer:
        num_sampled, follows = _run_all(scheduler, pipeline)
    seconds = time.perf_counter() - start
    busy, idle = timer.busy(), timer.idle()
    # The time before a pass is idle time only if no chunk was computed between it and the previous pass.
    pairs = [(b, i) for b, i, adjacent in zip(busy[1:], idle, follows[1:], strict=True) if adjacent]
    idle_share = statistics.median([i / (b + i) for b, i in pairs]) if pairs else 0.0
    return OfflineResult(seconds, num_sampled, idle_share)


def _run_all(scheduler: Scheduler, pipeline: Pipeline) -> tuple[int, list[bool]]:
    """Run steps until no request is left.

    Return the number of sampled tokens, and for each step without chunks whether the step before it had none either.
    Only such steps have a pass of decodes.
    """
    num_sampled, follows, no_chunks, now = 0, [], False, 0.0
    while True:
        plan = None if pipeline.closed else scheduler.plan(now)
        if plan is not None:
            pipeline.launch(plan)
            if plan.num_decodes == len(plan.rows):
                follows.append(no_chunks)
            no_chunks = plan.num_decodes == len(plan.rows)
        ended = pipeline.collect(leave=1 if plan is not None else 0)
        if ended is not None:
            scheduler.apply_result(ended.plan, ended.result, now)
            num_sampled += len(ended.result.tokens)
        elif plan is None:
            return num_sampled, follows
        now += 1.0


def random_prompts(count: int, tokens: int, vocab: int) -> list[list[int]]:
    """Return `count` prompts of `tokens` random tokens each, always the same."""
    rng = random.Random(0)
    return [rng.choices(range(300, vocab), k=tokens) for _ in range(count)]
