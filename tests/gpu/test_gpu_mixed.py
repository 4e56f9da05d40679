"""Steps of decodes and chunks in one pass, against the same steps in two passes: the graph, then the chunks."""

import random
from itertools import count

import pytest
import torch

from daemon.engine.cuda.buckets import choose_bucket
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams
from tests.engine.cpu.harness import generate, step
from tests.gpu.parts import make_gpu_runner, small_llama, tokens

CLOSE = {"auto": 0.1, "fp8": 0.3}  # largest difference of a logit, divided by the standard deviation
KINDS = ({"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": 2})
STEPS = [
    (1, [(0, 100)]),
    (3, [(37, 20), (0, 1)]),
    (24, [(0, 300)]),
    (41, [(160, 64), (16, 16), (5, 90)]),
]


@pytest.fixture(scope="module", params=CLOSE)
def kv_dtype(request):
    return request.param


@pytest.fixture(scope="module")
def runner(kv_dtype, tmp_path_factory):
    path = small_llama(tmp_path_factory.mktemp("model"))
    return make_gpu_runner(path, blocks=1000, max_num_seqs=48, max_batch_tokens=512, kv_dtype=kv_dtype)


def planned(runner, decodes, chunks):
    """Return a step of decodes behind computed prompts, and of chunks given as (tokens before it, its tokens)."""
    rng, blocks = random.Random(decodes), count(1)

    def made(i, length):
        params = RequestParams(SamplingParams(max_tokens=99, seed=i, **KINDS[i % len(KINDS)]), 0.0)
        table = [next(blocks) for _ in range(20)]
        return Request(i + 1, 1, 0, params, tokens(rng, length), length, block_table=table)

    decoding = [made(i, rng.randint(1, 290)) for i in range(decodes)]
    for start in range(0, decodes, 16):
        generate(runner, decoding[start : start + 16], 1, budget=512)
    rows = [Row(r, r.num_computed, 1, True) for r in decoding]
    for i, (before, length) in enumerate(chunks):
        r = made(decodes + i, before + length)
        if before:
            step(runner, [], [(r, before)])
        rows.append(Row(r, before, length, True))
    return StepPlan(rows, decodes)


@pytest.mark.parametrize(("decodes", "chunks"), STEPS, ids=str)
def test_logits_and_tokens(runner, kv_dtype, decodes, chunks, monkeypatch, report_figure, request):
    plan, bucket = planned(runner, decodes, chunks), choose_bucket(runner._buckets, decodes)
    real = [*range(decodes), *range(bucket, bucket + len(chunks))]
    found = []
    for way in ("two passes", "one pass", "two passes"):
        monkeypatch.setattr(runner, "_mixed_steps", way)
        result = runner.execute(plan)
        found.append((runner._forward.logits.cpu()[real], result.tokens))
    (expected, two), (got, one), (again, _) = found
    difference = float((got - expected).abs().amax() / expected.std())
    report_figure(f"{request.node.callspec.id}: logits of one pass within {difference:.1e} of their spread")
    assert difference < CLOSE[kv_dtype]
    # The step may be computed again: it writes the KV that it has written before.
    assert float((again - expected).abs().amax() / expected.std()) < CLOSE[kv_dtype]
    best = expected.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1]) > 2 * (got - expected).abs().amax()
    for i, row in enumerate(plan.rows):
        if clear[i] and row.request.sampling.temperature == 0.0:
            assert one[i] == two[i]


def test_nothing_but_attention_is_computed_twice(runner, monkeypatch):
    plan, calls = planned(runner, 5, [(0, 40)]), []
    products = runner._forward._model._products
    apply, replay = products.apply, runner._compute_decodes
    monkeypatch.setattr(products, "apply", lambda linear, x, out: (calls.append(len(x)), apply(linear, x, out)))
    monkeypatch.setattr(runner, "_compute_decodes", lambda bucket: (calls.append("graph"), replay(bucket)))
    runner.execute(plan)
    assert set(calls) == {48} and len(calls) == 4 * runner._config.num_layers  # five decodes in a bucket of eight
    assert torch.isfinite(runner._forward.logits[:9]).all()


def test_the_faster_way_is_measured_at_load_and_used(tmp_path):
    runner = make_gpu_runner(small_llama(tmp_path), mixed_steps="auto")
    assert set(runner.mixed_seconds) == {"one pass", "two passes"}
    assert runner._mixed_steps == min(runner.mixed_seconds, key=runner.mixed_seconds.get)
