"""Greedy answers of small random bf16 models, against Transformers in float32 with the same weights.

bf16 rounds. Where the best token leads by a hundredth of its logit or less, the engine may choose another token; the
reference then continues from that token.
"""

import random
from itertools import count

import pytest
import torch

from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager
from tests.engine.cpu.harness import request, step
from tests.gpu.parts import judge_greedy, logits_after, make_gpu_runner, small_llama, tokens, transformers_bf16

CLOSE, RARE = 1e-2, 0.02
CLOSE_E4M3, RARE_E4M3 = 0.2, 0.15
FAMILY = {
    "grouped, 64": {"hidden": 512, "heads": 8, "kv_heads": 2},
    "three to a group, 64": {"hidden": 576, "heads": 9, "kv_heads": 3},
    "grouped, 128, biases": {
        "hidden": 512,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
        "mlp_bias": True,
        "tie": False,
    },
}


@pytest.fixture(scope="module", params=FAMILY, ids=str)
def model_dir(request, tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("model"), seed=9, layers=2, **FAMILY[request.param])


@pytest.fixture(scope="module")
def reference(model_dir):
    return transformers_bf16(model_dir)


@pytest.fixture(scope="module")
def runner(model_dir):
    return make_gpu_runner(model_dir, decode_path="gemm")


@pytest.fixture(scope="module")
def small_batch_runner(model_dir):
    """A runner that computes decodes of one to four rows by the small-batch products."""
    return make_gpu_runner(model_dir, decode_path="gemv, prefetch")


def batch(n, output):
    """Return greedy requests. Many of them share a prefix."""
    rng = random.Random(3)
    beginnings = [tokens(rng, 40), tokens(rng, 17), []]
    made = []
    for rid in range(n):
        prompt = rng.choice(beginnings) + tokens(rng, rng.randint(1, 150))
        params = RequestParams(SamplingParams(max_tokens=output, seed=rid, temperature=0.0), float(rid))
        made.append(Request(rid, 1, 0, params, prompt, len(prompt)))
    return made


def served(runner, requests, *, overlap):
    """Run `requests` through a real scheduler and pipeline. The pool is too small for all of them."""
    scheduler = Scheduler(
        BlockManager(90, 16), max_num_seqs=24, max_batch_tokens=96, max_model_len=512, eos_token_ids=()
    )
    for r in requests:
        scheduler.add(r)
    pipeline, now = Pipeline(runner, overlap=overlap), 0.0
    while True:
        plan = None if pipeline.closed else scheduler.plan(now)
        if plan is not None:
            pipeline.launch(plan)
        ended = pipeline.collect(leave=1 if plan is not None else 0)
        if ended is not None:
            scheduler.apply_result(ended.plan, ended.result, now)
            scheduler.check()
        elif plan is None:
            return scheduler
        now += 1.0


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_scheduled_requests(runner, reference, graphs, overlap, monkeypatch, report_figure, request):
    if not graphs:
        monkeypatch.setattr(runner, "_compute_decodes", runner._decode_paths.run)
    requests = batch(40, 64)
    scheduler = served(runner, requests, overlap=overlap)
    assert scheduler.num_preemptions > 0
    assert scheduler.prefix_hit_tokens > 0
    assert all(r.num_output == 64 for r in requests)
    found = judge_greedy(reference, [(r.tokens, r.prompt_len) for r in requests])
    report_figure(
        f"{request.node.callspec.id}: {found.different} of {found.positions} greedy tokens differ, "
        f"the reference leads by {found.worst:.1e} of its logit at most"
    )
    assert found.worst <= CLOSE
    assert found.different <= RARE * found.positions


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_few_requests_at_a_time(small_batch_runner, reference, at_once, report_figure, request):
    requests = batch(12, 64)
    for start in range(0, len(requests), at_once):
        served(small_batch_runner, requests[start : start + at_once], overlap=True)
    found = judge_greedy(reference, [(r.tokens, r.prompt_len) for r in requests])
    report_figure(
        f"{request.node.callspec.id} at a time: {found.different} of {found.positions} greedy tokens differ, "
        f"the reference leads by {found.worst:.1e} of its logit at most"
    )
    assert found.worst <= CLOSE
    assert found.different <= RARE * found.positions


@pytest.mark.parametrize("path", ["gemm", "gemv"])
def test_logits(runner, small_batch_runner, reference, path, report_figure, request):
    """Logits of a prompt in chunks, and of the decodes after it."""
    worst = worst_logit_error(runner if path == "gemm" else small_batch_runner, reference)
    report_figure(f"{request.node.callspec.id}: logits within {worst:.1e} of their spread")
    assert worst < 0.1


def worst_logit_error(runner, reference):
    """Return the largest error of a logit, divided by the standard deviation of the reference's logits."""
    prompt = tokens(random.Random(8), 300)
    r = request(prompt, count(1), 320)
    logits = []
    for n in (100, 120, 80):
        step(runner, [], [(r, n)])
    logits.append(runner._forward.logits[:1].cpu())
    for _ in range(8):
        step(runner, [r])
        logits.append(runner._forward.logits[:1].cpu())
    expected = logits_after(reference, r.tokens, r.prompt_len)
    return float((torch.cat(logits) - expected.cpu()).abs().amax() / expected.std().cpu())


def test_e4m3_kv(model_dir, reference, report_figure, request):
    runner = make_gpu_runner(model_dir, kv_dtype="fp8")
    requests = batch(40, 64)
    served(runner, requests, overlap=True)
    found = judge_greedy(reference, [(r.tokens, r.prompt_len) for r in requests])
    worst = worst_logit_error(runner, reference)
    report_figure(
        f"{request.node.callspec.id}, e4m3 KV: {found.different} of {found.positions} greedy tokens differ, ahead by "
        f"{found.worst:.1e} at most; logits within {worst:.1e} of their spread"
    )
    assert found.worst <= CLOSE_E4M3
    assert found.different <= RARE_E4M3 * found.positions


def test_rows_sampled_on_the_host_beside_rows_sampled_on_the_device(runner, reference):
    requests = batch(12, 24)
    for r in requests[::3]:
        r.params = RequestParams(with_logprobs(r.params.sampling), r.params.arrival)
    served(runner, requests, overlap=True)
    found = judge_greedy(reference, [(r.tokens, r.prompt_len) for r in requests])
    assert found.worst <= CLOSE


def with_logprobs(sampling):
    return SamplingParams(max_tokens=sampling.max_tokens, seed=sampling.seed, temperature=0.0, logprobs=2)
