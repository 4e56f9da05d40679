"""Steps of the CUDA engine, timed: by the wall, and by the device around each decode pass."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench.gpu_peaks import settle
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager
from daemon.models.model_config import ModelConfig

# As integers: sign, mantissa and the last bit of the exponent stay as they are drawn, its other bits are put.
_NOISE = {
    1: (torch.int8, ~0x78 | 0x08, 0x20),
    2: (torch.int16, ~0x7F80 | 0x80, 0x3E00),
    4: (torch.int32, ~0x7F800000 | 0x800000, 0x3E000000),
}


class Made(NamedTuple):
    """How a runner is made. `kv_blocks`: 0 for all that fits."""

    device: str
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int = 16
    kv_dtype: str = "auto"
    prefill: str = "fa2"
    kv_blocks: int = 0


def make(config: ModelConfig, made: Made) -> CudaRunner:
    """Load a runner with dummy weights, its pool full of noise: a chip's clock depends on the bits it moves."""
    item = 1 if made.kv_dtype == "fp8" else 2 if made.device != "cpu" else 4
    block = 2 * config.num_layers * made.block_size * config.num_kv_heads * config.head_dim * item
    runner = CudaRunner(
        config,
        device=made.device,
        kv_dtype=made.kv_dtype,
        load_format="dummy",
        block_size=made.block_size,
        max_num_seqs=made.max_num_seqs,
        max_batch_tokens=made.max_batch_tokens,
        max_model_len=made.max_model_len,
        kv_memory=made.kv_blocks * block,
        prefill=made.prefill,  # type: ignore[arg-type]
    )
    runner.load()
    _fill(runner.pool_memory, item)
    settle(made.device)
    return runner


def _fill(pool: torch.Tensor, item: int) -> None:
    """Numbers of `item` bytes each, from 2^-3 to 2^-1, of either sign."""
    dtype, keep, put = _NOISE[item]
    for piece in pool.view(dtype).split(1 << 28):
        piece.random_(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        piece.bitwise_and_(keep).bitwise_or_(put)


class Stamps:
    """When the device began and ended each decode pass. A context, in which the runner's passes are stamped."""

    def __init__(self, runner: CudaRunner, device: str) -> None:
        self._runner = runner
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> Stamps:
        self._compute = self._runner._compute_decodes

        def stamped(bucket: int) -> None:
            began = self._now()
            self._compute(bucket)
            self._pairs.append((began, self._now()))

        self._runner._compute_decodes = stamped
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner._compute_decodes = self._compute
        settle(self._device)

    def busy(self) -> list[float]:
        """Seconds of each pass."""
        return [self._seconds(*pair) for pair in self._pairs]

    def idle(self) -> list[float]:
        """Seconds from the end of each pass to the beginning of the next."""
        return [self._seconds(one[1], next_[0]) for one, next_ in itertools.pairwise(self._pairs)]

    def _now(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, a: Any, b: Any) -> float:
        return float(b - a) if self._device == "cpu" else float(a.elapsed_time(b)) / 1e3


class Steps(NamedTuple):
    """Means, in seconds. `idle`: of the device between two decode passes, copies of inputs and tokens included."""

    step: float
    busy: float
    idle: float


def decode(
    runner: CudaRunner, made: Made, batch: int, context: int, steps: int, *, overlap: bool, graphs: bool
) -> Steps:
    """Decode steps of `batch` sequences of `context` tokens and more, over KV of noise.

    Raises RuntimeError if the pool is too small.
    """
    requests = _standing(runner, batch, context, steps + 2, made.block_size)
    if (last := requests[-1].block_table[-1]) >= runner.num_blocks:
        raise RuntimeError(f"{last + 1} blocks are needed and the pool has {runner.num_blocks}")
    compute = runner._compute_decodes
    if not graphs:
        runner._compute_decodes = runner._passes.decode
    try:
        _take_steps(runner, requests, context, 0, 3, overlap)
        settle(made.device)
        with Stamps(runner, made.device) as stamps:
            times = _take_steps(runner, requests, context, 3, steps, overlap)
    finally:
        runner._compute_decodes = compute
    return Steps(*map(statistics.fmean, (times, stamps.busy(), stamps.idle())))


def _standing(runner: CudaRunner, batch: int, context: int, more: int, block_size: int) -> list[Request]:
    """Requests whose KV is taken to be there, without their last token's."""
    each = -(-(context + more) // block_size)
    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0, temperature=0.0), 0.0)
    prompts = random_prompts(batch, context, runner.vocab_size)
    return [
        Request(i + 1, 1, 0, params, prompt, context, block_table=list(range(1 + i * each, 1 + (i + 1) * each)))
        for i, prompt in enumerate(prompts)
    ]


def _take_steps(
    runner: CudaRunner, requests: Sequence[Request], context: int, first: int, stop: int, overlap: bool
) -> list[float]:
    """Steps [first, stop); the seconds from one result to the next."""
    flying: deque[Any] = deque()
    ends = []

    def collect() -> None:
        drawn = runner.collect(flying.popleft()).tokens
        for request, token in zip(requests, drawn, strict=True):
            request.tokens.append(token)
        ends.append(time.perf_counter())

    for i in range(first, stop):
        rows = [Row(request, context - 1 + i, 1, True) for request in requests]
        flying.append(runner.launch(StepPlan(rows, len(rows))))
        if len(flying) == (2 if overlap else 1):
            collect()
    while flying:
        collect()
    times = [b - a for a, b in itertools.pairwise(ends)]
    return times[:-1] if overlap else times  # behind the last step nothing was launched


def prefill(runner: CudaRunner, made: Made, tokens: int, repeat: int) -> float:
    """Median seconds of a prompt of `tokens` in one chunk, from launch to its first token."""
    [request] = _standing(runner, 1, tokens, 1, made.block_size)
    plan = StepPlan([Row(request, 0, tokens, True)], 0)
    return _median(lambda: runner.execute(plan), repeat)


def _median(work: Callable[[], Any], repeat: int) -> float:
    work()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Served(NamedTuple):
    """A batch of prompts through the real scheduler. `idle_share`: of the time between decode passes of steps
    without prefill, what the device waited."""

    seconds: float
    output_tokens: int
    idle_share: float


def offline(runner: CudaRunner, made: Made, prompts: Sequence[list[int]], output: int, *, overlap: bool) -> Served:
    """Answer all prompts, greedily, `output` tokens each."""
    scheduler = Scheduler(
        BlockManager(runner.num_blocks, made.block_size),
        max_num_seqs=made.max_num_seqs,
        max_batch_tokens=made.max_batch_tokens,
        max_model_len=made.max_model_len,
        eos_token_ids=(),
    )
    params = SamplingParams(max_tokens=output, seed=0, temperature=0.0)
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(i, 1, 0, RequestParams(params, float(i)), list(prompt), len(prompt)))
    pipeline = Pipeline(runner, overlap=overlap)
    began = time.perf_counter()
    with Stamps(runner, made.device) as stamps:
        drawn, pure = _serve(scheduler, pipeline)
    seconds = time.perf_counter() - began
    busy, idle = stamps.busy(), stamps.idle()
    # A pass is preceded by idle time of its own only if no chunk was computed between it and the one before.
    pairs = [(b, i) for b, i, plain in zip(busy[1:], idle, pure, strict=False) if plain]
    waited = statistics.median([i / (b + i) for b, i in pairs]) if pairs else 0.0
    return Served(seconds, drawn, waited)


def _serve(scheduler: Scheduler, pipeline: Pipeline) -> tuple[int, list[bool]]:
    """Until nothing is left: tokens drawn, and for each decode pass whether its step had no chunk."""
    drawn, plain, now = 0, [], 0.0
    while True:
        plan = None if pipeline.closed else scheduler.plan(now)
        if plan is not None:
            pipeline.launch(plan)
            if plan.num_decodes:
                plain.append(plan.num_decodes == len(plan.rows))
        ended = pipeline.collect(leave=1 if plan is not None else 0)
        if ended is not None:
            scheduler.apply_result(ended.plan, ended.result, now)
            drawn += len(ended.result.tokens)
        elif plan is None:
            return drawn, plain
        now += 1.0


def random_prompts(count: int, tokens: int, vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(300, vocab), k=tokens) for _ in range(count)]
