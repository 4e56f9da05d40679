"""The model compared with Transformers: chunks, shared prefixes, and many variants of Llama."""

import random
import subprocess
import sys
from itertools import count
from typing import Any

import pytest
import torch

from daemon.engine.cpu.model import Decoder
from daemon.models.model_config import ModelError
from tests.engine.cpu.harness import (
    LogitsRecorder,
    generate,
    is_greedy,
    make_runner,
    reference_logits,
    request,
    step,
    transformers_model,
)
from tests.models.tiny_model import FAMILY, make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=FAMILY, ids=str)
def model_dir(request, tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY[request.param])


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY["grouped"])


def prompts(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [random_tokens(rng, rng.randint(1, longest)) for _ in range(n)]


def random_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 380) for _ in range(n)]


def test_greedy_tokens_and_logits_agree_with_transformers(model_dir):
    runner = make_runner(model_dir, blocks=600)
    recorder = LogitsRecorder(runner)
    blocks = count(1)
    requests = [request(p, blocks, len(p) + 8) for p in prompts(56, 120)]
    generate(runner, requests, output=8, chunk=50, budget=200)
    reference = transformers_model(model_dir)
    for r in requests:
        expected = reference_logits(reference, r)
        assert expected.argmax(-1).tolist() == r.tokens[r.prompt_len :]
        got = torch.stack(recorder.of(r))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_every_block_size_agrees_with_transformers(grouped, block_size):
    runner = make_runner(grouped, block_size=block_size, blocks=100)
    blocks = count(1)
    requests = [request(p, blocks, len(p) + 6, block_size) for p in prompts(5, 200)]
    generate(runner, requests, output=6, chunk=70)
    reference = transformers_model(grouped)
    for r in requests:
        assert is_greedy(reference, r)


def test_a_shared_prefix_is_computed_once(grouped):
    runner = make_runner(grouped)
    blocks = count(1)
    shared, tails = random_tokens(random.Random(3), 37), prompts(3, 30, seed=1)
    first = request(shared + tails[0], blocks, 100)
    step(runner, [], [(first, first.pending)])
    others = [request(shared + tail, blocks, 100) for tail in tails]
    for r in others:
        r.block_table[:2] = first.block_table[:2]
        r.num_computed = 32
    generate(runner, others, output=8)
    reference = transformers_model(grouped)
    for r in others:
        assert is_greedy(reference, r)


def test_a_step_without_samples_gives_no_token(grouped):
    runner = make_runner(grouped)
    r = request([5, 6, 7, 8], count(1), 16)
    step(runner, [], [(r, 2)])
    assert len(r.tokens) == 4


def test_bf16_follows_fp32(grouped):
    logits, prompt = [], random_tokens(random.Random(5), 90)
    for dtype in ("fp32", "bf16"):
        runner = make_runner(grouped, dtype=dtype)
        assert runner.pool_spec(1).dtype == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        recorder = LogitsRecorder(runner)
        r = request(prompt, count(1), 128)
        generate(runner, [r], output=1, chunk=40)
        r.tokens[-1] = 7
        generate(runner, [r], output=2)
        logits.append(torch.stack(recorder.of(r)))
    assert torch.nn.functional.cosine_similarity(*logits).min() > 0.998


def test_two_threads_compute_the_same_model(grouped):
    outputs = []
    for threads in (2, 1):
        runner = make_runner(grouped, threads=threads)
        blocks = count(1)
        requests = [request(p, blocks, len(p) + 6) for p in prompts(12, 100)]
        generate(runner, requests, output=6, chunk=64)
        outputs.append([r.tokens for r in requests])
    assert outputs[0] == outputs[1]


def test_no_step_compiles_a_kernel(grouped):
    runner = make_runner(grouped)
    model: Decoder = runner._model
    ops = model._ops
    used: list[Any] = [ops.add_rms_norm, ops.silu_mul, ops.rope_and_store, *model._attention[False]]
    kernels: list[Any] = [*used, *(k for k in ops if k not in used)]
    before = [len(k.signatures) for k in kernels]
    assert before == [1] * len(used) + [0] * (len(kernels) - len(used))
    blocks = count(1)
    generate(runner, [request(p, blocks, len(p) + 4) for p in prompts(9, 60)], output=4, chunk=17)
    assert [len(k.signatures) for k in kernels] == before


def test_dummy_weights_need_no_files_and_are_always_the_same(tmp_path):
    path = make_tiny_llama(tmp_path, weights=False, tokenizer=False)
    outputs = []
    for _ in range(2):
        runner = make_runner(path, load_format="dummy")
        r = request([4, 5, 6], count(1), 40)
        generate(runner, [r], output=20)
        outputs.append(r.tokens)
    assert outputs[0] == outputs[1]


def test_deterministic_refuses_bf16(grouped):
    with pytest.raises(ModelError, match="fp32"):
        make_runner(grouped, deterministic=True, dtype="bf16")
    assert make_runner(grouped, deterministic=True, dtype="auto").pool_spec(1).dtype == "float32"


def test_the_worker_module_does_not_load_torch():
    """The runner limits OpenMP's spinning, which has an effect only if torch is not loaded yet."""
    code = "import daemon.engine.build_runner, daemon.engine.worker, sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
