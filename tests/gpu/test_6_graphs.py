"""A replayed decode step against the same step without its graph, for every bucket."""

import random
from itertools import count

import pytest
import torch

from daemon.engine.cuda.buckets import graph_buckets
from daemon.engine.runner import Row, StepPlan
from tests.engine.driving import generate, request
from tests.gpu.parts import make_gpu_runner, small_llama, tokens

LARGEST = 132


@pytest.fixture(scope="module", params=[64, 128], ids=lambda d: f"head_dim {d}")
def runner(request, tmp_path_factory):
    path = small_llama(tmp_path_factory.mktemp("model"), head_dim=request.param)
    return make_gpu_runner(path, blocks=1 + LARGEST * 16, max_num_seqs=LARGEST, max_batch_tokens=2048)


@pytest.fixture(scope="module")
def requests(runner):
    """Their prompts are computed."""
    rng, blocks = random.Random(0), count(1)
    made = [request(tokens(rng, rng.randint(1, 240)), blocks, 256) for _ in range(LARGEST)]
    for start in range(0, LARGEST, 8):
        generate(runner, made[start : start + 8], 1, budget=2048)
    return made


def decoded(runner, requests):
    """Tokens and logits of the requests' next step, which leaves nothing behind but the same KV."""
    rows = [Row(r, len(r.tokens) - 1, 1, True) for r in requests]
    drawn = runner.execute(StepPlan(rows, len(rows))).tokens
    # On the host: a copy on the device is another stream's work, which the next step would not wait for.
    return drawn, runner._passes.logits[: len(rows)].cpu()


@pytest.mark.parametrize("rows", sorted({*graph_buckets(LARGEST), 3, 7, 31, 131}))
def test_replay_gives_what_the_step_gives(runner, requests, rows, monkeypatch):
    chosen = random.Random(rows).sample(requests, rows)
    drawn, logits = decoded(runner, chosen)
    monkeypatch.setattr(runner, "_compute_decodes", runner._passes.decode)
    expected_drawn, expected = decoded(runner, chosen)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    assert drawn == expected_drawn or not torch.equal(logits, expected)


def test_replays_of_all_buckets_in_any_order(runner, requests, monkeypatch):
    """They share memory, and each leaves it to the next."""
    rng = random.Random(1)
    chosen = [rng.sample(requests, rng.randint(1, LARGEST)) for _ in range(40)]
    replayed = [decoded(runner, some) for some in chosen]
    monkeypatch.setattr(runner, "_compute_decodes", runner._passes.decode)
    for some, (_, logits) in zip(chosen, replayed, strict=True):
        torch.testing.assert_close(logits, decoded(runner, some)[1], rtol=1e-2, atol=1e-2)
