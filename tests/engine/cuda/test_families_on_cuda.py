"""Every family by the CUDA engine's runner on the CPU: greedy tokens and logits equal those of Transformers."""

import random
from itertools import count

import pytest
import torch

from daemon.engine.cuda import runner as runner_module
from daemon.engine.cuda.small_batch import small_batch_buckets
from daemon.models.model_config import read_model_config
from tests.engine.cpu.harness import generate, is_greedy, reference_logits, request, step, transformers_model
from tests.engine.cuda.harness import make_cuda_runner
from tests.models.tiny_families import FAMILIES, ROPES, make_tiny

pytestmark = pytest.mark.integration

LIKE_A_LLAMA = {"mistral", "qwen2", "phi3"}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model_dir(kind, tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model"), FAMILIES[kind])


@pytest.fixture(scope="module")
def runner(model_dir):
    return make_cuda_runner(model_dir, late=True, max_batch_tokens=256)


@pytest.fixture(scope="module")
def reference(model_dir):
    return transformers_model(model_dir)


def tokens(rng, n):
    return [rng.randrange(3, 380) for _ in range(n)]


def test_greedy_tokens(runner, reference):
    """Prompts in chunks beside decodes, longer than the windows, in common passes."""
    rng, blocks = random.Random(0), count(1)
    requests = [request(tokens(rng, rng.randint(1, 120)), blocks, 136) for _ in range(20)]
    generate(runner, requests, output=8, chunk=50, budget=200)
    assert all(is_greedy(reference, r) for r in requests)


def test_logits(runner, reference):
    r = request(tokens(random.Random(1), 150), count(200), 170)
    logits = []
    for n in (60, 7, 83):
        step(runner, [], [(r, n)])
    logits.append(runner._forward.logits[:1].clone())
    for _ in range(5):
        step(runner, [r])
        logits.append(runner._forward.logits[:1].clone())
    expected = reference_logits(reference, r).float()
    ours, theirs = (torch.log_softmax(x, -1) for x in (torch.cat(logits), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_small_batches_have_kernels_of_their_own_only_for_layers_like_a_llamas(kind, model_dir):
    buckets = small_batch_buckets((1, 2, 4, 8), read_model_config(model_dir), 1 << 17)
    assert buckets == ((1, 2, 4) if kind in LIKE_A_LLAMA else ())


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3, part of a head rotated"])
def test_heads_without_a_kernel_of_their_width_are_filled_with_zeros(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "head_dims", lambda device: (8, 48, 64))
    path = make_tiny(tmp_path, FAMILIES[kind])
    runner = make_cuda_runner(path, blocks=60)
    assert runner.pool_spec(1).head_dim == 48
    rng, blocks = random.Random(3), count(1)
    requests = [request(tokens(rng, n), blocks, n + 8) for n in (3, 60, 90)]
    generate(runner, requests, output=6, chunk=40)
    assert all(is_greedy(transformers_model(path), r) for r in requests)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_beyond_the_original_length(rope, tmp_path):
    """Dynamic and longrope depend on the length in Transformers, so the reference gets the whole length at once."""
    length = 200
    short = {"max_position_embeddings": 64} if rope == "dynamic" else {}
    path = make_tiny(tmp_path, ROPES[rope], **short)
    runner = make_cuda_runner(path, blocks=40, max_model_len=length + 1, max_batch_tokens=256)
    r = request(tokens(random.Random(2), length), count(1), length + 8)
    step(runner, [], [(r, length)])
    assert is_greedy(transformers_model(path), r)
