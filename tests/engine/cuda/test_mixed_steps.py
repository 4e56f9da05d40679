"""Steps of decodes and chunks in one pass, against the same steps in two passes, on the CPU."""

import random
from collections import deque
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from daemon.engine.cuda.mixed_steps import fastest_way, measure_ways
from daemon.engine.cuda.model import Decoder
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams
from tests.engine.cpu.harness import generate, request, step
from tests.engine.cuda.harness import make_cuda_runner
from tests.models.tiny_model import FAMILY, make_tiny_llama

pytestmark = pytest.mark.integration

KINDS = ({"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": 2}, {"min_p": 0.05}, {"presence_penalty": 1.0})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY["grouped"])


@pytest.fixture(scope="module", params=["auto", "fp8"], ids=["fp32", "fp8 KV"])
def runners(request, model_dir):
    """A runner for each way to compute mixed steps."""
    return [
        make_cuda_runner(model_dir, kv_dtype=request.param, mixed_steps=mixed_steps)
        for mixed_steps in ("one pass", "two passes")
    ]


@pytest.fixture
def runner(runners):
    return runners[0]


def tokens(rng, n):
    return [rng.randrange(3, 380) for _ in range(n)]


def made(rng, blocks, length, **sampling):
    prompt = tokens(rng, length)
    params = RequestParams(SamplingParams(max_tokens=99, seed=length, **sampling), 0.0)
    table = [next(blocks) for _ in range(8)]
    return Request(length, 1, 0, params, prompt, length, block_table=table)


def mixed_step(runner, num_decodes, samples):
    """Run a step of decodes, with computed prompts of all kinds, and of chunks; `samples`: for each, if it ends its
    prompt. Return the plan and the result."""
    rng, blocks = random.Random(num_decodes), count(1)
    decodes = [made(rng, blocks, 3 + 7 * i, **KINDS[i % 5]) for i in range(num_decodes)]
    generate(runner, decodes, 1)
    rows = [Row(r, r.num_computed, 1, True) for r in decodes]
    for i, ends in enumerate(samples):
        r = made(rng, blocks, 50 + i, **KINDS[i % 5])
        step(runner, [], [(r, 11 * i + 1)])  # the chunk begins behind a prefix
        rows.append(Row(r, r.num_computed, r.pending if ends else 5, ends))
    plan = StepPlan(rows, num_decodes)
    return plan, runner.execute(plan)


@pytest.mark.parametrize(
    ("num_decodes", "samples"),
    [(1, [True]), (1, [False]), (5, [True, False, True]), (9, [False, False]), (17, [True] * 4)],
    ids=str,
)
def test_a_step_has_the_tokens_logprobs_and_kv_of_two_passes(runners, num_decodes, samples):
    (plan, result), (_, expected) = (mixed_step(runner, num_decodes, samples) for runner in runners)
    assert result.tokens == expected.tokens
    assert len(result.tokens) == num_decodes + sum(samples)
    for mine, theirs in zip(result.logprobs or (), expected.logprobs or (), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.top_ids == theirs.top_ids
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    for row in plan.rows:
        blocks = row.request.block_table[: (row.start + row.count) // 16]  # full ones
        kv, other = (runner._pool[blocks].float() for runner in runners)
        torch.testing.assert_close(kv, other, rtol=0.13, atol=1e-4)  # e4m3: a rounding to the other side


def test_the_weights_are_read_once(runners, monkeypatch):
    passes, logits = [], Decoder.logits

    def counted(self, parts, *args, **options):
        passes.append([len(part.inputs.tokens) for part in parts])
        logits(self, parts, *args, **options)

    monkeypatch.setattr(Decoder, "logits", counted)
    found = []
    for runner in runners:
        blocks = count(1)
        decodes = [request([5, 6], blocks, 16) for _ in range(3)]
        generate(runner, decodes, 1)
        passes.clear()
        step(runner, decodes, [(request([7] * 20, blocks, 32), 20)])
        found.append(list(passes))
    assert found == [[[4, 20]], [[4], [20]]]  # three decodes are padded to the bucket of four


@contextmanager
def memory_ends(runner, monkeypatch, *, above, layer):
    """Raise torch.OutOfMemoryError in each pass with more than `above` tokens, at the MLP of `layer`."""
    forward, ops = runner._forward, runner._forward._model._ops
    compute, silu_mul = forward._compute, ops.silu_mul
    calls = count()

    def begun(*args, **options):
        nonlocal calls
        calls = count()
        compute(*args, **options)

    def limited(gate_up, out):
        if next(calls) == layer and len(gate_up) > above:
            raise torch.OutOfMemoryError("no memory")
        silu_mul(gate_up, out)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "_compute", begun)
        patch.setattr(ops, "silu_mul", limited)
        yield


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("above", "dropped"), [(30, (3,)), (10, (2, 3))], ids=["small chunk fits", "no chunk fits"])
def test_decodes_keep_their_tokens_when_memory_ends_within_the_pass(model_dir, monkeypatch, above, dropped, layer):
    """Part of the pass has then been computed, and is computed again. Only the device knows the decodes' inputs."""
    runner, blocks = make_cuda_runner(model_dir), count(1)
    decodes, expected = ([made(random.Random(i), blocks, 5 + i, **KINDS[i]) for i in range(2)] for _ in range(2))
    small, big, twin = (made(random.Random(n), blocks, n, temperature=0.0) for n in (20, 60, 20))
    generate(runner, [*expected, twin], 3)
    first = runner.launch(StepPlan([Row(r, 0, r.prompt_len, True) for r in decodes], 0))
    rows = [Row(r, r.prompt_len, 1, True) for r in decodes]
    chunks = [Row(small, 0, 20, True), Row(big, 0, 60, True)]
    with memory_ends(runner, monkeypatch, above=above, layer=layer):
        second = runner.launch(StepPlan([*rows, *chunks], 2))
    one, two = runner.collect(first), runner.collect(second)
    assert two.dropped == dropped
    for i, r in enumerate(decodes):
        r.tokens += [one.tokens[i], two.tokens[i]]
        r.num_computed = len(r.tokens) - 1
    generate(runner, decodes, 3)
    assert [r.tokens for r in decodes] == [r.tokens for r in expected]
    assert two.tokens[2] == (NO_TOKEN if 2 in dropped else twin.tokens[20])
    assert two.tokens[3] == NO_TOKEN


class TimedRunner:
    """A runner of which a step takes a set time."""

    def __init__(self, seconds):
        self.seconds, self.now, self.way = seconds, 0.0, None
        self.used, self.in_flight, self.most_in_flight = [], deque(), 0

    def use(self, way):
        self.way = way
        self.used.append(way)

    def launch(self, plan):
        self.in_flight.append(plan)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return plan

    def collect(self, ticket):
        assert self.in_flight.popleft() is ticket
        self.now += self.seconds[self.way] * (3 if len(self.used) <= 2 else 1)  # a slowdown in the first turn


@pytest.mark.parametrize(("one", "two"), [(0.9, 1.0), (1.2, 1.0)])
def test_the_faster_way_is_used(one, two):
    runner = TimedRunner({"one pass": one, "two passes": two})
    plan = StepPlan([], 0)
    seconds = measure_ways(runner, plan, runner.use, in_flight=2, clock=lambda: runner.now)
    assert seconds == pytest.approx(runner.seconds)
    assert fastest_way(seconds) == ("one pass" if one < two else "two passes")
    assert runner.used[:4] == ["one pass", "two passes"] * 2
    assert runner.most_in_flight == 2
    assert not runner.in_flight


def test_a_runner_measures_both_ways_with_a_step_of_its_own_and_keeps_its_requests(model_dir):
    runner, blocks = make_cuda_runner(model_dir, mixed_steps="auto", max_num_seqs=8), count(1)
    assert runner._mixed_steps == "one pass"  # on the CPU nothing is measured
    assert runner.mixed_seconds == {}
    mine, twin = (made(random.Random(1), blocks, 9, temperature=0.0) for _ in range(2))
    generate(runner, [mine, twin], 2)
    runner._measure_mixed_steps()
    assert set(runner.mixed_seconds) == {"one pass", "two passes"}
    assert runner._mixed_steps == min(runner.mixed_seconds, key=runner.mixed_seconds.get)
    generate(runner, [mine, twin], 2)
    assert mine.tokens == twin.tokens


def test_an_engine_for_one_request_has_no_mixed_steps_to_measure(model_dir):
    runner = make_cuda_runner(model_dir, mixed_steps="auto", max_num_seqs=1)
    runner._measure_mixed_steps()
    assert runner.mixed_seconds == {}
