"""Out of memory in a chunk ends its request with an error. All other requests continue with the right tokens.

A load that finds too little memory says whether another one may succeed.
"""

import random
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from daemon.engine.runner import NO_TOKEN, Row, StepPlan, Unavailable
from daemon.models.model_config import ModelError
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import DEVICE, judge_greedy, make_gpu_runner, small_llama, tokens, transformers_bf16

CHUNK = 1900  # tokens: its gate and up projection takes 119 MiB; that of a chunk of 100 tokens takes 6
ROOM = 40 << 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("model"), intermediate=16384)


@pytest.fixture(scope="module")
def reference(model_dir):
    return transformers_bf16(model_dir)


@pytest.fixture(scope="module")
def runner(model_dir):
    return make_gpu_runner(model_dir, blocks=600, max_batch_tokens=2048, max_model_len=2048)


@contextmanager
def cramped():
    """Limit the process to little more memory than it has now."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + ROOM) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_only_the_largest_chunk_is_dropped(runner, reference):
    rng, blocks = random.Random(6), count(1)
    decoding, small, big = (
        request(tokens(rng, n), blocks, total) for n, total in ((10, 64), (100, 128), (CHUNK, 2000))
    )
    generate(runner, [decoding], 2)
    rows = [Row(decoding, decoding.num_computed, 1, True), Row(small, 0, 100, True), Row(big, 0, CHUNK, True)]
    with cramped():
        result = runner.execute(StepPlan(rows, 1))
        assert result.dropped == (2,)
        assert result.tokens[2] == NO_TOKEN
        decoding.num_computed, small.num_computed = decoding.num_computed + 1, 100
        for r, token in zip((decoding, small), result.tokens, strict=False):
            r.tokens.append(token)
        generate(runner, [decoding, small], 20)
    found = judge_greedy(reference, [(r.tokens, r.prompt_len) for r in (decoding, small)])
    assert found.worst <= 3e-2


def test_a_step_launched_behind_the_failing_one_is_correct(runner, reference):
    """Its input is a token of the step that runs out of memory, which only the device knows."""
    rng, blocks = random.Random(7), count(1)
    steady, big = (request(tokens(rng, n), blocks, total) for n, total in ((10, 64), (CHUNK, 2000)))
    generate(runner, [steady], 2)
    at = steady.num_computed
    with cramped():
        first = runner.launch(StepPlan([Row(steady, at, 1, True), Row(big, 0, CHUNK, True)], 1))
        second = runner.launch(StepPlan([Row(steady, at + 1, 1, True)], 1))
        one, two = runner.collect(first), runner.collect(second)
    assert one.dropped == (1,)
    steady.tokens += [one.tokens[0], *two.tokens]
    assert judge_greedy(reference, [(steady.tokens, steady.prompt_len)]).worst <= 3e-2


def test_the_same_chunk_is_computed_when_there_is_memory_again(runner):
    big = request(tokens(random.Random(6), CHUNK), count(1), 2000)
    result = runner.execute(StepPlan([Row(big, 0, CHUNK, True)], 0))
    assert result.dropped == ()
    assert result.tokens[0] != NO_TOKEN


@pytest.fixture
def others_hold_memory(monkeypatch):
    """Leave little to this process, as if other processes held the rest."""
    total = torch.cuda.mem_get_info(DEVICE)[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 20, total))


def test_a_load_without_room_for_kv_may_succeed_later(model_dir, others_hold_memory):
    with pytest.raises(Unavailable, match=r"at this time: other processes hold memory .* too little"):
        make_gpu_runner(model_dir)


def test_a_load_without_room_in_its_share_never_succeeds(model_dir):
    with pytest.raises(ModelError, match=r"memory_share leaves .* too little"):
        make_gpu_runner(model_dir, memory_share=0.001)


def test_weights_that_find_no_memory_are_explained(model_dir):
    with cramped(), pytest.raises(ModelError, match="the model does not fit: its weights take"):
        make_gpu_runner(model_dir)


def test_weights_that_find_no_memory_because_of_others_may_find_it_later(model_dir, others_hold_memory):
    with cramped(), pytest.raises(Unavailable, match="does not fit at this time"):
        make_gpu_runner(model_dir)
