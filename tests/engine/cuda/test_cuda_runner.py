"""The CUDA engine's runner on the CPU: it gives the tokens of Transformers and of the CPU engine, for any order of
steps."""

import random
from collections import deque
from itertools import count

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from daemon.engine.cuda import runner as runner_module
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.cuda.sampler import slot_sampling
from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, Row, StepPlan
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import Finish, RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from tests.engine.cpu.harness import (
    check_prompt_logprobs,
    generate,
    is_greedy,
    make_runner,
    reference_logits,
    request,
    runner_settings,
    score_prompts,
    step,
    transformers_model,
)
from tests.engine.cuda.harness import RandomSteps, make_cuda_runner
from tests.models.tiny_model import FAMILY, make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=FAMILY, ids=str)
def any_model(request, tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY[request.param])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY["grouped"])


@pytest.fixture(scope="module")
def reference(model_dir):
    return transformers_model(model_dir)


@pytest.fixture(scope="module", params=["late, one pass", "immediate, two passes"])
def runner(request, model_dir):
    when, mixed_steps = request.param.split(", ")
    return make_cuda_runner(
        model_dir, late=when == "late", mixed_steps=mixed_steps, max_num_seqs=24, max_batch_tokens=128
    )


def tokens(rng, n):
    return [rng.randrange(3, 380) for _ in range(n)]


def test_every_family_agrees_with_transformers(any_model):
    runner = make_cuda_runner(any_model, blocks=300)
    rng, blocks = random.Random(0), count(1)
    requests = [request(tokens(rng, rng.randint(1, 120)), blocks, 128) for _ in range(10)]
    generate(runner, requests, output=8, chunk=50, budget=200)
    reference = transformers_model(any_model)
    for r in requests:
        assert is_greedy(reference, r)


@pytest.mark.parametrize("block_size", [8, 128])
def test_block_sizes(model_dir, reference, block_size):
    runner = make_cuda_runner(model_dir, blocks=100, block_size=block_size)
    rng, blocks = random.Random(1), count(1)
    requests = [request(tokens(rng, rng.randint(1, 200)), blocks, 208, block_size) for _ in range(3)]
    generate(runner, requests, output=6, chunk=70)
    for r in requests:
        assert is_greedy(reference, r)


def scheduled(runner, requests, num_blocks, budget=96):
    """Run `requests` through a real scheduler. The pool is too small for all of them."""
    blocks = BlockManager(num_blocks, 16)
    scheduler = Scheduler(blocks, max_num_seqs=24, max_batch_tokens=budget, max_model_len=512, eos_token_ids=())
    for r in requests:
        scheduler.add(r)
    now = 0.0
    while plan := scheduler.plan(now):
        scheduler.apply_result(plan, runner.execute(plan), now)
        scheduler.check()
        now += 1.0
    return scheduler


def batch(rng, n, output, **sampling):
    beginnings = [tokens(rng, 40), tokens(rng, 17), []]
    requests = []
    for rid in range(n):
        prompt = rng.choice(beginnings) + tokens(rng, rng.randint(1, 60))
        params = SamplingParams(max_tokens=output, seed=rid, **sampling)
        requests.append(Request(rid, 1, 0, RequestParams(params, float(rid)), prompt, len(prompt)))
    return requests


def test_scheduled_requests_agree_with_transformers(runner, reference):
    requests = batch(random.Random(3), 40, 48, temperature=0.0)
    scheduler = scheduled(runner, requests, 40)
    assert scheduler.num_preemptions > 0
    assert scheduler.prefix_hit_tokens > 0
    for r in requests:
        assert r.num_output == 48
        assert is_greedy(reference, r)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"min_p": 0.05, "temperature": 1.2},
        {"repetition_penalty": 1.3, "min_tokens": 5},
        {"frequency_penalty": 0.7, "logit_bias": ((7, 4.0),)},
    ],
    ids=str,
)
def test_sampled_requests_agree_with_the_cpu_engine(runner, model_dir, sampling):
    outputs = []
    for engine in (runner, make_runner(model_dir)):
        requests = batch(random.Random(4), 16, 24, **sampling)
        scheduled(engine, requests, 60)
        outputs.append([r.tokens[r.prompt_len :] for r in requests])
    assert outputs[0] == outputs[1]


def test_rows_of_all_kinds_in_one_step_get_their_own_tokens_and_logprobs(runner, model_dir):
    """Greedy rows, sampled rows and rows with penalties or logprobs, decodes and chunks: each row is independent."""
    kinds = [{"temperature": 0.0}, {}, {"logprobs": 2}, {"presence_penalty": 1.0}, {"top_k": 5, "logprobs": 0}]
    results = []
    for engine in (runner, make_runner(model_dir)):
        rng, blocks = random.Random(5), count(1)
        rows = []
        for i in range(15):
            params = RequestParams(SamplingParams(max_tokens=9, seed=i, **kinds[i % 5]), 0.0)
            prompt = tokens(rng, rng.randint(2, 12))
            table = [next(blocks)]
            rows.append(Row(Request(i, 1, 0, params, prompt, len(prompt), block_table=table), 0, len(prompt), True))
        first = engine.execute(StepPlan(rows, 0))
        for row, token in zip(rows, first.tokens, strict=True):
            row.request.tokens.append(token)
        decodes = [Row(r.request, len(r.request.tokens) - 1, 1, True) for r in rows[:7]]
        chunks = [Row(r.request, 0, len(r.request.tokens), i % 2 == 0) for i, r in enumerate(rows[7:])]
        results += [first, engine.execute(StepPlan([*decodes, *chunks], 7))]
    for mine, expected in zip(results[:2], results[2:], strict=True):
        assert mine.tokens == expected.tokens
        for a, b in zip(mine.logprobs, expected.logprobs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert a.top_ids == b.top_ids
                assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)


class Overlap(RandomSteps):
    """Drives a runner by hand: the next step is launched before the last one is collected.

    Requests arrive at random times, and their prompts are split into random chunks. A request continues to decode
    while only the device knows its last token. It takes one step too many, like a request that ends by a stop token.
    """

    def __init__(self, runner, requests, output, rng):
        super().__init__(runner, rng)
        self.waiting, self.output = deque(requests), output

    def run(self):
        while self.waiting or self.running or self.in_flight:
            while self.waiting and len(self.running) < 20 and self.rng.random() < 0.6:
                self.running.append(self.waiting.popleft())
            plan = self.plan()
            if plan.rows:
                self.launch(plan)
            if self.in_flight and (len(self.in_flight) == 2 or not plan.rows or self.rng.random() < 0.2):
                self.collect_one()

    def collect_one(self):
        for r in self.collect():
            if r.num_output >= self.output and r in self.running:
                self.running.remove(r)


PROMPTS = [tokens(random.Random(i), 1 + 7 * i % 60) for i in range(40)]
OUTPUT = 14
DRAWS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0, "top_p": 0.95}}


def overlapping(draws, blocks):
    made = []
    for i, prompt in enumerate(PROMPTS):
        params = RequestParams(SamplingParams(max_tokens=99, seed=i, **DRAWS[draws]), 0.0)
        table = [next(blocks) for _ in range(6)]
        made.append(Request(i, 1, 0, params, list(prompt), len(prompt), block_table=table))
    return made


@pytest.fixture(scope="module")
def one_by_one(model_dir):
    """The tokens of each request, computed in steps that do not overlap; by sampling kind."""
    plain, outputs = make_runner(model_dir), {}
    for draws in DRAWS:
        requests = overlapping(draws, count(1))
        generate(plain, requests, OUTPUT)
        outputs[draws] = [r.tokens for r in requests]
    return outputs


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("draws", DRAWS)
def test_overlapped_steps_give_the_tokens_of_steps_one_by_one(runner, one_by_one, draws, seed):
    requests = overlapping(draws, count(10))
    overlap = Overlap(runner, requests, OUTPUT, random.Random(seed))
    overlap.run()
    assert overlap.unknown > 100
    for r, whole in zip(requests, one_by_one[draws], strict=True):
        assert r.tokens[: len(whole)] == whole


def test_overlapped_steps_of_a_scheduler_agree_with_transformers(runner, reference):
    """The real scheduler and the real pipeline. The pool is too small for all requests."""
    blocks = BlockManager(40, 16)
    scheduler = Scheduler(blocks, max_num_seqs=24, max_batch_tokens=96, max_model_len=512, eos_token_ids=())
    requests = batch(random.Random(11), 30, 30, temperature=0.0)
    for r in requests[::7]:
        logprobs = replace(r.sampling, logprobs=1)  # its tokens are sampled on the host
        r.params = replace(r.params, sampling=logprobs)
    for r in requests:
        scheduler.add(r)
    pipeline, now, depth = Pipeline(runner), 0.0, 0
    while True:
        plan = None if pipeline.closed else scheduler.plan(now)
        if plan is not None:
            pipeline.launch(plan)
        depth = max(depth, len(pipeline))
        ended = pipeline.collect(leave=1 if plan is not None else 0)
        if ended is not None:
            scheduler.apply_result(ended.plan, ended.result, now)
            scheduler.check()
        elif plan is None:
            break
        now += 1.0
    assert depth == 2
    assert scheduler.num_preemptions > 0
    for r in requests:
        assert r.num_output == 30
        assert is_greedy(reference, r)


def test_a_slot_is_reused_only_when_no_step_in_flight_uses_it(runner):
    """Twice as many requests as slots. New requests start while tokens of the previous ones are on the device."""
    rng, blocks = random.Random(9), count(1)
    groups = [[request(tokens(rng, 4), blocks, 16) for _ in range(24)] for _ in range(4)]
    prompts = [list(r.tokens) for group in groups for r in group]
    flying = deque()
    for group in groups:
        for start, n in ((0, 4), (4, 1)):
            rows = [Row(r, start, n, True) for r in group]
            flying.append((runner.launch(StepPlan(rows, 24 if n == 1 else 0)), group))
            if len(flying) == 2:
                append(runner, *flying.popleft())
    append(runner, *flying.popleft())
    again = [request(prompt, count(200 + i), 16) for i, prompt in enumerate(prompts)]
    for i in range(0, len(again), 24):
        generate(runner, again[i : i + 24], 2, budget=96)
    assert [r.tokens for group in groups for r in group] == [r.tokens for r in again]


def test_a_request_whose_parameters_cannot_be_read_ends_alone(model_dir, monkeypatch):
    """The launch raises after slots were assigned: the others must not compute with what these slots held before."""
    runner = make_cuda_runner(model_dir, blocks=300)
    healthy = batch(random.Random(12), 8, 10)
    scheduled(runner, healthy, 100)
    requests = batch(random.Random(12), 8, 10)

    def raises(sampling):
        if sampling is requests[3].sampling:
            raise OverflowError("too large for int32")
        return slot_sampling(sampling)

    monkeypatch.setattr(runner_module, "slot_sampling", raises)
    scheduler = Scheduler(
        BlockManager(100, 16), max_num_seqs=24, max_batch_tokens=96, max_model_len=512, eos_token_ids=()
    )
    for r in requests:
        scheduler.add(r)
    pipeline = Pipeline(runner)
    while scheduler.running or scheduler.waiting:
        plan = None if pipeline.closed else scheduler.plan(0.0)
        if plan is not None:
            pipeline.launch(plan)
        if ended := pipeline.collect(leave=1 if plan is not None else 0):
            scheduler.apply_result(ended.plan, ended.result, 0.0)
    assert (requests[3].finish, requests[3].num_output) == (Finish.ERROR, 0)
    assert [r.tokens for r in requests if r is not requests[3]] == [r.tokens for r in healthy if r.rid != 3]


def test_logprobs_of_prompts_agree_with_transformers(runner, reference):
    """Of chunks alone and beside decodes, with rows that are not scored between them."""
    rng, blocks = random.Random(13), count(100)
    prompts = [tokens(rng, n) for n in (2, 30, 1, 60)]
    for chunk, num_decodes in ((10**6, 0), (7, 3), (20, 5)):
        decodes = [request(tokens(rng, 5), blocks, 16) for _ in range(num_decodes)]
        if decodes:
            step(runner, [], [(r, r.pending) for r in decodes])
        found = score_prompts(runner, prompts, top=3, chunk=chunk, decodes=decodes)
        for prompt, entries in zip(prompts, found, strict=True):
            check_prompt_logprobs(reference, prompt, entries)


def append(runner, ticket, group):
    for r, token in zip(group, runner.collect(ticket).tokens, strict=True):
        r.tokens.append(token)


def test_steps_that_may_not_overlap_are_rejected(runner):
    blocks = count(1)
    a, b, c = (request([5, 6, 7], blocks, 16) for _ in range(3))
    adjusted = Request(
        99,
        1,
        0,
        RequestParams(SamplingParams(max_tokens=5, seed=0, logprobs=0), 0.0),
        [4, 5],
        2,
        block_table=[next(blocks)],
    )
    plan = StepPlan([Row(a, 0, 3, True)], 0)
    assert not runner.blocks_overlap(plan)
    first = runner.launch(plan)
    second = runner.launch(StepPlan([Row(b, 0, 3, True)], 0))
    with pytest.raises(ValueError, match="in flight"):
        runner.launch(StepPlan([Row(c, 0, 3, True)], 0))
    with pytest.raises(ValueError, match="order"):
        runner.collect(second)
    assert not runner.blocks_overlap(plan)
    runner.collect(first)
    runner.collect(second)
    plan = StepPlan([Row(adjusted, 0, 2, True)], 0)
    assert runner.blocks_overlap(plan)
    third = runner.launch(plan)
    assert runner.blocks_overlap(plan)
    with pytest.raises(ValueError, match="host"):
        runner.launch(StepPlan([Row(c, 0, 3, True)], 0))
    runner.collect(third)
    with pytest.raises(ValueError, match="collect before"):
        runner.launch(StepPlan([Row(c, 3, 1, True)], 1))
    c.tokens.append(9)
    runner.execute(StepPlan([Row(c, 0, 4, True)], 0))


def test_a_rejected_step_does_not_change_the_step_in_flight(runner, reference):
    blocks = count(1)
    a, b, unallocated = (request(tokens(random.Random(i), 9), blocks, 16) for i in range(3))
    unallocated.block_table = []
    first = runner.launch(StepPlan([Row(a, 0, 9, True)], 0))
    for _ in range(3):
        with pytest.raises(ValueError, match="no room"):
            runner.launch(StepPlan([Row(b, 8, 1, True), Row(unallocated, 0, 9, True)], 1))
    second = runner.launch(StepPlan([Row(b, 0, 9, True)], 0))
    for r, ticket in ((a, first), (b, second)):
        r.tokens += runner.collect(ticket).tokens
        assert is_greedy(reference, r)


def test_a_step_above_the_limits_is_rejected(runner):
    blocks = count(1)
    many = [request([5], blocks, 16) for _ in range(25)]
    with pytest.raises(ValueError, match="max_num_seqs"):
        runner.launch(StepPlan([Row(r, 0, 1, True) for r in many], 25))
    with pytest.raises(ValueError, match="max_batch_tokens"):
        runner.launch(StepPlan([Row(request([5] * 130, blocks, 130), 0, 130, True)], 0))


@pytest.fixture
def cramped(runner, monkeypatch):
    """A runner on a device with memory for chunks of at most 40 tokens in total."""
    compute = runner._forward._model.logits

    def limited(parts, *args, **options):
        if any(not part.decode and len(part.inputs.tokens) > 40 for part in parts):
            raise torch.OutOfMemoryError("no memory")
        compute(parts, *args, **options)

    monkeypatch.setattr(runner._forward._model, "logits", limited)
    return runner


def test_out_of_memory_drops_only_the_largest_chunk(cramped, reference):
    rng, blocks = random.Random(6), count(1)
    decoding = request(tokens(rng, 10), blocks, 64)
    generate(cramped, [decoding], 2)
    small, big, middle = (request(tokens(rng, n), blocks, 112) for n in (15, 100, 20))
    rows = [Row(decoding, decoding.num_computed, 1, True)]
    rows += [Row(small, 0, 15, True), Row(big, 0, 60, False), Row(middle, 0, 20, True)]
    result = cramped.execute(StepPlan(rows, 1))
    assert result.dropped == (2,)
    for r, token in zip((decoding, small, middle), result.tokens, strict=True):
        r.tokens.append(token)
        assert is_greedy(reference, r)
    alone = cramped.execute(StepPlan([Row(big, 0, 100, True)], 0))
    assert (alone.tokens, alone.dropped) == ([NO_TOKEN], (0,))
    generate(cramped, [decoding], 6)
    assert is_greedy(reference, decoding)


def test_a_dropped_request_ends_and_its_blocks_are_no_prefix_of_others(cramped, reference):
    blocks = BlockManager(40, 16)
    scheduler = Scheduler(blocks, max_num_seqs=24, max_batch_tokens=60, max_model_len=512, eos_token_ids=())
    prompt = tokens(random.Random(7), 100)
    greedy = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    big = Request(1, 1, 0, RequestParams(greedy, 0.0), list(prompt), 100)
    scheduler.add(big)
    plan = scheduler.plan(0.0)
    [emission] = scheduler.apply_result(plan, cramped.execute(plan), 0.0)
    assert (emission.request, emission.tokens, emission.finish) == (big, [], Finish.ERROR)
    assert blocks.num_used == 0
    twin = Request(2, 1, 0, RequestParams(greedy, 1.0), prompt[:35], 35)
    scheduler.add(twin)
    while plan := scheduler.plan(1.0):
        scheduler.apply_result(plan, cramped.execute(plan), 1.0)
    assert twin.num_cached == 0
    assert is_greedy(reference, twin)


def test_e4m3_kv_is_close_to_fp32(model_dir, reference):
    runner = make_cuda_runner(model_dir, kv_dtype="fp8")
    assert (runner.pool_spec(1).dtype, runner.pool_spec(1).item_bytes) == ("float8_e4m3fn", 1)
    r = request(tokens(random.Random(8), 90), count(1), 128)
    step(runner, [], [(r, 50)])
    step(runner, [], [(r, 40)])
    logits = [runner._forward.logits[0].clone()]
    for _ in range(4):
        step(runner, [r])
        logits.append(runner._forward.logits[0].clone())
    close = torch.nn.functional.cosine_similarity(torch.stack(logits), reference_logits(reference, r))
    assert close.min() > 0.99
    assert close.max() < 0.9999999  # the KV was rounded


def test_large_keys_are_clamped_to_e4m3_without_nan():
    from daemon.engine.cuda.ops import to_pool_dtype

    kept = to_pool_dtype(torch.tensor([1000.0, -1e30, 3.0, 448.0]), torch.float8_e4m3fn).float()
    assert kept.tolist() == [448.0, -448.0, 3.0, 448.0]


def test_bf16_is_close_to_fp32(model_dir, reference):
    runner = make_cuda_runner(model_dir, dtype="bf16")
    assert runner.pool_spec(1).dtype == "bfloat16"
    r = request(tokens(random.Random(10), 60), count(1), 128)
    step(runner, [], [(r, 60)])
    got = runner._forward.logits[:1].clone()
    assert torch.nn.functional.cosine_similarity(got, reference_logits(reference, r)).min() > 0.998


def test_dummy_weights_equal_those_of_the_cpu_engine(tmp_path):
    path = make_tiny_llama(tmp_path, weights=False, tokenizer=False)
    outputs = []
    for engine in (make_cuda_runner(path, load_format="dummy"), make_runner(path, load_format="dummy")):
        r = request([4, 5, 6], count(1), 40)
        generate(engine, [r], output=20)
        outputs.append(r.tokens)
    assert outputs[0] == outputs[1]


def test_the_pool_is_one_allocation_of_complete_blocks(model_dir):
    config = open_model(model_dir)
    settings = runner_settings(max_num_seqs=8, max_batch_tokens=64, max_model_len=128)
    block_bytes = CudaRunner(config, settings, device="cpu").pool_spec(1).block_bytes
    runner = CudaRunner(config, replace(settings, kv_memory=10 * block_bytes + 5), device="cpu")
    runner.load()
    assert runner.num_blocks == 10
    memory = runner.pool_memory
    assert len(memory) == runner.pool_spec(10).nbytes
    before = memory.clone()
    r = request([5, 6, 7], iter([9]), 16)
    generate(runner, [r], 2)
    changed = (memory != before).view(10, -1).any(1)
    assert changed.tolist() == [i == 9 for i in range(10)]
    assert np.shares_memory(memory.numpy(), runner._pool.numpy())


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cuda:0", {"dtype": "fp32"}, "bf16"),
        ("cuda:0", {"deterministic": True}, "deterministic"),
        ("cpu", {"kv_dtype": "fp4"}, "kv_dtype"),
    ],
)
def test_settings_that_cannot_work_are_rejected_at_once(model_dir, device, options, reason):
    with pytest.raises(ModelError, match=reason):
        CudaRunner(open_model(model_dir), runner_settings(**options), device=device)


def test_a_pool_without_a_block_is_rejected(model_dir):
    runner = CudaRunner(open_model(model_dir), runner_settings(kv_memory=100), device="cpu")
    with pytest.raises(ModelError, match="kv_memory"):
        runner.load()
