"""Replays of decode steps against the same steps without a graph, for every bucket."""

import random
from functools import partial
from itertools import count

import pytest
import torch

from daemon.engine.cuda.buckets import graph_buckets
from daemon.engine.cuda.graphs import DecodeGraphs, Step
from daemon.engine.cuda.staging import CudaStream
from daemon.engine.runner import Row, StepPlan
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import DEVICE, SIMULATED, make_gpu_runner, small_llama, tokens

LARGEST = 132


@pytest.fixture(scope="module", params=[(64, "gemv"), (128, "gemm")], ids=["head_dim 64, gemv", "head_dim 128"])
def runner(request, tmp_path_factory):
    head_dim, decode_path = request.param
    path = small_llama(tmp_path_factory.mktemp("model"), head_dim=head_dim)
    return make_gpu_runner(
        path, blocks=1 + LARGEST * 16, max_num_seqs=LARGEST, max_batch_tokens=2048, decode_path=decode_path
    )


@pytest.fixture(scope="module")
def requests(runner):
    """Requests with computed prompts."""
    rng, blocks = random.Random(0), count(1)
    made = [request(tokens(rng, rng.randint(1, 240)), blocks, 256) for _ in range(LARGEST)]
    for start in range(0, LARGEST, 8):
        generate(runner, made[start : start + 8], 1, budget=2048)
    return made


def decoded(runner, requests):
    """Return tokens and logits of the requests' next step.

    It writes the same KV each time, and changes nothing else.
    """
    rows = [Row(r, len(r.tokens) - 1, 1, True) for r in requests]
    drawn = runner.execute(StepPlan(rows, len(rows))).tokens
    # To the host: a copy on the device would be in another stream, for which the next step does not wait.
    return drawn, runner._forward.logits[: len(rows)].cpu()


@pytest.mark.parametrize("rows", sorted({*graph_buckets(LARGEST), 3, 7, 31, 131}))
def test_a_replay_gives_the_result_of_the_step(runner, requests, rows, monkeypatch):
    chosen = random.Random(rows).sample(requests, rows)
    drawn, logits = decoded(runner, chosen)
    monkeypatch.setattr(runner, "_compute_decodes", runner._decode_paths.run)
    expected_drawn, expected = decoded(runner, chosen)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    assert drawn == expected_drawn or not torch.equal(logits, expected)


def test_replays_of_all_buckets_in_any_order(runner, requests, monkeypatch):
    """The graphs share memory, which each replay reuses."""
    rng = random.Random(1)
    chosen = [rng.sample(requests, rng.randint(1, LARGEST)) for _ in range(40)]
    replayed = [decoded(runner, some) for some in chosen]
    monkeypatch.setattr(runner, "_compute_decodes", runner._decode_paths.run)
    for some, (_, logits) in zip(chosen, replayed, strict=True):
        torch.testing.assert_close(logits, decoded(runner, some)[1], rtol=1e-2, atol=1e-2)


def test_the_fastest_path_with_the_right_output_is_used():
    stream, x, y = CudaStream(torch.device(DEVICE)), *torch.zeros(2, 1 << 22, device=DEVICE)
    torch.cuda.synchronize()

    def slow():
        for _ in range(50):
            y.mul_(0.5)
        x.fill_(1.0)

    paths: dict[str, Step] = {"slow": slow, "nothing": partial(y.mul_, 0.5)} | {
        name: partial(x.fill_, value) for name, value in (("fast", 1.01), ("wrong", 1.5), ("nan", torch.nan))
    }
    graphs = DecodeGraphs(stream)
    graphs.capture(4, paths, x)
    graphs.capture(2, {"wrong": paths["wrong"]}, x)  # one path: nothing is measured
    assert set(graphs.seconds) == {4} and set(graphs.seconds[4]) == {"slow", "fast"}
    fastest = graphs.paths[4] if SIMULATED else "fast"  # a simulated device has no times
    assert graphs.paths == {4: fastest, 2: "wrong"}
    with torch.cuda.stream(stream.stream):
        for bucket, value in ((4, {"fast": 1.01, "slow": 1.0}[graphs.paths[4]]), (2, 1.5)):
            graphs.replay(bucket)
            torch.testing.assert_close(x.cpu(), torch.full((1 << 22,), value))
