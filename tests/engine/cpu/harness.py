"""Helpers that drive a CPU runner step by step, and compare it with Transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daemon.engine.cpu.runner import CpuRunner
from daemon.engine.request import Request
from daemon.engine.rows import next_row
from daemon.engine.runner import Row, RunnerSettings, StepPlan
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.ipc.prompt_logprobs import PromptLogprob, record_bytes, unpack
from daemon.kvpool.block_manager import BlockManager
from daemon.models.loader import open_model

_ids = count(1)


def runner_settings(**options: Any) -> RunnerSettings:
    """Return the settings of a small runner; `options` replaces defaults."""
    defaults: dict[str, Any] = {"max_num_seqs": 64, "max_batch_tokens": 512, "max_model_len": 512}
    return RunnerSettings(**(defaults | options))


def make_runner(path: Path, *, blocks: int = 400, **options: Any) -> CpuRunner:
    """Return a loaded fp32 runner. Its pool is full of noise: KV that is read but never written changes results."""
    settings = runner_settings(**({"dtype": "fp32"} | options))
    runner = CpuRunner(open_model(path, load_format=settings.load_format), settings)
    pool = bytearray(runner.pool_spec(blocks).nbytes)
    noise = np.frombuffer(pool, np.uint8)
    noise[:] = np.random.default_rng(0).integers(0x41, 0x43, len(noise), dtype=np.uint8)  # as a float about 10
    runner.load(memoryview(pool))
    return runner


def request(tokens: list[int], blocks: Iterator[int], total: int, block_size: int = 16) -> Request:
    """Return a greedy request with blocks for `total` tokens."""
    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0, temperature=0.0), arrival=0.0)
    table = [next(blocks) for _ in range(-(-total // block_size))]
    return Request(
        rid=next(_ids),
        epoch=1,
        frontend=0,
        params=params,
        tokens=list(tokens),
        prompt_len=len(tokens),
        block_table=table,
    )


def step(runner: CpuRunner, decodes: list[Request], chunks: list[tuple[Request, int]] = ()) -> None:
    """Run one step: decodes, and chunks as (request, number of tokens). Update the requests' progress."""
    rows = [Row(r, r.num_computed, 1, True) for r in decodes]
    rows += [Row(r, r.num_computed, n, n == r.pending) for r, n in chunks]
    result = runner.execute(StepPlan(rows, len(decodes)))
    tokens = iter(result.tokens)
    for row in rows:
        row.request.num_computed += row.count
        if row.sample:
            row.request.tokens.append(next(tokens))
    assert next(tokens, None) is None


def generate(runner: CpuRunner, requests: list[Request], output: int, chunk: int = 10**6, budget: int = 512) -> None:
    """Run all requests in common steps of decodes and chunks, until each has `output` output tokens."""
    while unfinished := [r for r in requests if r.num_output < output]:
        decodes = [r for r in unfinished if r.pending == 1]
        left, chunks = budget - len(decodes), []
        for r in unfinished:
            n = min(r.pending, chunk, left)
            if r.pending > 1 and n > 0:
                chunks.append((r, n))
                left -= n
        step(runner, decodes, chunks)


def serve(
    runner: CpuRunner, rng: random.Random, *, requests: int, longest: int, blocks: int, budget: int, output: int
) -> list[Request]:
    """Run greedy requests through a scheduler to their end, and return them.

    The pool of `blocks` is too small for all, so some are preempted; common prefixes make them share blocks.
    `longest`: tokens of a prompt behind its prefix. `budget`: tokens of a step.
    """
    scheduler = Scheduler(
        BlockManager(blocks, 16), max_num_seqs=24, max_batch_tokens=budget, max_model_len=512, eos_token_ids=()
    )
    prefixes = [random_tokens(rng, 40), random_tokens(rng, 17), []]
    served = []
    for rid in range(requests):
        prompt = rng.choice(prefixes) + random_tokens(rng, rng.randint(1, longest))
        params = RequestParams(SamplingParams(max_tokens=output, seed=0, temperature=0.0), arrival=float(rid))
        served.append(Request(rid, 1, 0, params, prompt, len(prompt)))
        scheduler.add(served[-1])
    now = 0.0
    while plan := scheduler.plan(now):
        scheduler.apply_result(plan, runner.execute(plan), now)
        scheduler.check()
        now += 1.0
    assert scheduler.num_preemptions > 0
    assert scheduler.prefix_hit_tokens > 0
    assert all(r.num_output == output for r in served)
    return served


def score_prompts(
    runner: Any, prompts: list[list[int]], *, top: int = 0, chunk: int = 10**6, decodes: list[Request] = ()
) -> list[list[PromptLogprob]]:
    """Return the logprobs of the tokens of each prompt, computed together in chunks beside one step of `decodes`."""
    blocks, records = count(1), [b""] * len(prompts)
    params = RequestParams(SamplingParams(max_tokens=0, seed=0, prompt_logprobs=top), arrival=0.0)
    requests = [
        Request(next(_ids), 1, 0, params, p, len(p), block_table=[next(blocks) for _ in range(len(p) // 16 + 1)])
        for p in prompts
    ]
    rows = [Row(r, r.num_computed, 1, True) for r in decodes]
    while unfinished := [i for i, r in enumerate(requests) if r.pending]:
        unfinished.sort(key=lambda i: requests[i].pending > 1)  # decodes come first
        parts = [next_row(requests[i], min(chunk, requests[i].pending)) for i in unfinished]
        num_decodes = len(rows) + sum(requests[i].pending == 1 for i in unfinished)
        result = runner.execute(StepPlan([*rows, *parts], num_decodes))
        for n, (i, row) in enumerate(zip(unfinished, parts, strict=True), len(rows)):
            records[i] += (result.prompt_logprobs or {}).get(n, b"")
            row.request.unscored -= len(row.scored)
            row.request.num_computed += row.count
        rows = []
    assert not any(r.unscored for r in requests)
    return [unpack(found, record_bytes(top)) for found in records]


def check_prompt_logprobs(model: Any, prompt: list[int], found: list[PromptLogprob]) -> None:
    """Compare with Transformers."""
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    assert len(found) == len(prompt) - 1
    for i, entry in enumerate(found):
        values = expected[i]
        assert abs(entry.logprob - float(values[prompt[i + 1]])) < 1e-3
        tops = values.topk(len(entry.top_ids))
        assert np.allclose(entry.top_logprobs, tops.values.tolist(), atol=1e-3)
        assert abs(entry.rank - 1 - int((values > values[prompt[i + 1]]).sum())) <= 1  # of almost equal logits


def random_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 380) for _ in range(n)]


class LogitsRecorder:
    """Wraps a runner's sampler and records the logits that it gets, by (request id, position)."""

    def __init__(self, runner: CpuRunner) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self._sampler = runner._sampler
        runner._sampler = self

    def sample(self, logits: torch.Tensor, requests: list[Request], masks: Any = None) -> Any:
        for row, r in zip(logits, requests, strict=True):
            self.logits[r.rid, len(r.tokens)] = row.clone()
        return self._sampler.sample(logits, requests, masks)

    def of(self, r: Request) -> list[torch.Tensor]:
        """Return the logits of one request, in order of position."""
        return [row for (rid, _), row in sorted(self.logits.items(), key=lambda item: item[0]) if rid == r.rid]


def transformers_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logits(model: Any, r: Request) -> torch.Tensor:
    """Return Transformers' logits for each output token of `r`, [output, vocab], from one forward pass."""
    return model(torch.tensor([r.tokens[:-1]])).logits[0, r.prompt_len - 1 :]


def is_greedy(model: Any, r: Request) -> bool:
    """Return True if Transformers, given the tokens before it, also selects each output token."""
    return reference_logits(model, r).argmax(-1).tolist() == r.tokens[r.prompt_len :]
