"""A replayed decode step against the same step without its graph, for every bucket."""

import random
from functools import partial
from itertools import count

import pytest
import torch

from daemon.engine.cuda.buckets import graph_buckets
from daemon.engine.cuda.graphs import Graphs
from daemon.engine.cuda.staging import CudaStream
from daemon.engine.runner import Row, StepPlan
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import DEVICE, SIMULATED, make_gpu_runner, small_llama, tokens

LARGEST = 132


@pytest.fixture(
    scope="module", params=[(64, "few rows"), (128, "all rows")], ids=["head_dim 64, few rows", "head_dim 128"]
)
def runner(request, tmp_path_factory):
    head_dim, way = request.param
    path = small_llama(tmp_path_factory.mktemp("model"), head_dim=head_dim)
    return make_gpu_runner(path, blocks=1 + LARGEST * 16, max_num_seqs=LARGEST, max_batch_tokens=2048, way=way)


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
    monkeypatch.setattr(runner, "_compute_decodes", runner._decode)
    expected_drawn, expected = decoded(runner, chosen)
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    assert drawn == expected_drawn or not torch.equal(logits, expected)


def test_replays_of_all_buckets_in_any_order(runner, requests, monkeypatch):
    """They share memory, and each leaves it to the next."""
    rng = random.Random(1)
    chosen = [rng.sample(requests, rng.randint(1, LARGEST)) for _ in range(40)]
    replayed = [decoded(runner, some) for some in chosen]
    monkeypatch.setattr(runner, "_compute_decodes", runner._decode)
    for some, (_, logits) in zip(chosen, replayed, strict=True):
        torch.testing.assert_close(logits, decoded(runner, some)[1], rtol=1e-2, atol=1e-2)


def test_the_quickest_way_is_taken_of_those_that_come_to_the_same():
    stream, x, y = CudaStream(torch.device(DEVICE)), *torch.zeros(2, 1 << 22, device=DEVICE)
    torch.cuda.synchronize()

    def slow():
        for _ in range(50):
            y.mul_(0.5)
        x.fill_(1.0)

    ways = {"slow": slow, "nothing": partial(y.mul_, 0.5)} | {
        name: partial(x.fill_, value) for name, value in (("quick", 1.01), ("wrong", 1.5), ("nan", torch.nan))
    }
    graphs = Graphs(stream)
    graphs.capture(4, ways, x)
    graphs.capture(2, {"wrong": ways["wrong"]}, x)  # by which nothing is measured
    assert set(graphs.seconds) == {4} and set(graphs.seconds[4]) == {"slow", "quick"}
    assert graphs.ways == {4: "quick" if not SIMULATED else graphs.ways[4], 2: "wrong"}  # times are not simulated
    with torch.cuda.stream(stream.stream):
        for bucket, value in ((4, {"quick": 1.01, "slow": 1.0}[graphs.ways[4]]), (2, 1.5)):
            graphs.replay(bucket)
            torch.testing.assert_close(x.cpu(), torch.full((1 << 22,), value))
