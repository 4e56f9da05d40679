"""The output does not depend on batches, chunks, preemption, prefix cache hits or recomputation."""

import random
from itertools import count

import pytest
import torch

from tests.engine.cpu.harness import (
    LogitsRecorder,
    check_prompt_logprobs,
    generate,
    is_greedy,
    make_runner,
    random_tokens,
    request,
    score_prompts,
    serve,
    step,
    transformers_model,
)
from tests.models.tiny_model import make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), heads=6, kv_heads=2, hidden=96)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 thread", "2 threads"])
def deterministic(model_dir, request):
    runner = make_runner(model_dir, deterministic=True, dtype="auto", blocks=800, threads=request.param)
    return runner, LogitsRecorder(runner)


def same_bits(a, b):
    return torch.equal(torch.stack(a).view(torch.int32), torch.stack(b).view(torch.int32))


def test_same_bits_alone_in_any_batch_and_in_any_chunks(deterministic):
    runner, recorder = deterministic
    rng = random.Random(7)
    prompt, output = random_tokens(rng, 75), 40
    alone = request(prompt, count(1), 128)
    generate(runner, [alone], output)
    for chunk, num_others in ((1, 0), (7, 3), (10**6, 5), (33, 40)):
        blocks = count(1)
        others = [request(random_tokens(rng, rng.randint(1, 90)), blocks, 160) for _ in range(num_others)]
        again = request(prompt, blocks, 128)
        index = num_others // 2
        generate(runner, [*others[:index], again, *others[index:]], output, chunk=chunk)
        assert again.tokens == alone.tokens
        assert same_bits(recorder.of(again), recorder.of(alone))


def test_same_bits_when_output_is_recomputed_as_prompt(deterministic):
    runner, recorder = deterministic
    prompt, output = random_tokens(random.Random(8), 50), 60
    alone = request(prompt, count(1), 128)
    generate(runner, [alone], output)
    for kept in (1, 14, 37):
        resumed = request(alone.tokens[: len(prompt) + kept], count(20), 128)
        generate(runner, [resumed], output - kept, chunk=29)
        assert resumed.tokens == alone.tokens
        assert same_bits(recorder.of(resumed), recorder.of(alone)[kept:])


def test_same_bits_over_blocks_that_another_request_computed(deterministic):
    runner, recorder = deterministic
    rng = random.Random(9)
    shared = random_tokens(rng, 64)
    prompt = shared + random_tokens(rng, 9)
    alone = request(prompt, count(1), 128)
    generate(runner, [alone], 20)
    donor = request(shared + random_tokens(rng, 30), count(100), 128)
    step(runner, [], [(donor, 50)])
    step(runner, [], [(donor, donor.pending)])
    reusing = request(prompt, count(200), 128)
    reusing.block_table[:4] = donor.block_table[:4]
    reusing.num_computed = 64
    generate(runner, [reusing], 20)
    assert same_bits(recorder.of(reusing), recorder.of(alone))


def test_logprobs_of_prompts_agree_with_transformers_in_any_chunks(model_dir):
    runner, rng = make_runner(model_dir), random.Random(5)
    runner._model._slice_rows = 8  # so that a chunk takes several
    prompts = [random_tokens(rng, n) for n in (2, 30, 1, 75)]
    reference = transformers_model(model_dir)
    for chunk in (10**6, 7):
        for prompt, found in zip(prompts, score_prompts(runner, prompts, top=3, chunk=chunk), strict=True):
            check_prompt_logprobs(reference, prompt, found)


def test_same_bits_of_prompt_logprobs_alone_in_any_batch_and_in_any_chunks(deterministic):
    runner, _ = deterministic
    rng = random.Random(6)
    prompt = random_tokens(rng, 60)
    (alone,) = score_prompts(runner, [prompt], top=2)
    for chunk in (1, 9):
        others = [random_tokens(rng, rng.randint(1, 40)) for _ in range(5)]
        assert score_prompts(runner, [*others, prompt], top=2, chunk=chunk)[-1] == alone


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["fp32", "deterministic"])
def test_scheduled_requests_agree_with_transformers(model_dir, options):
    """The pool is too small for all requests, so some are preempted; common prefixes make them share blocks."""
    blocks, budget = 40, 96
    runner = make_runner(model_dir, blocks=blocks, max_batch_tokens=budget, **options)
    requests = serve(runner, random.Random(3), requests=50, longest=60, blocks=blocks, budget=budget, output=64)
    reference = transformers_model(model_dir)
    for r in requests:
        assert is_greedy(reference, r)
