"""Rows under masks of grammars on the device: the tokens of the CPU engine, and steps that wait for each other."""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, NOT_YET, Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams
from tests.engine.cpu.harness import make_runner
from tests.engine.cuda import harness
from tests.models.tiny_model import FAMILY, make_tiny_llama

pytestmark = pytest.mark.integration
VOCAB = 384
KINDS = [{"grammar": "g"}, {"grammar": "g", "top_p": 0.8, "top_k": 9}, {"grammar": "g", "logprobs": 1}, {}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **FAMILY["grouped"])


@pytest.fixture(scope="module", params=["late, one pass", "immediate, two passes"])
def runner(request, model_dir):
    when, mixed_steps = request.param.split(", ")
    return harness.make_cuda_runner(
        model_dir, late=when == "late", mixed_steps=mixed_steps, max_num_seqs=24, max_batch_tokens=256
    )


class RandomMasks:
    """Masks that depend only on the request and its length; some rows have none."""

    def of(self, request):
        rng = np.random.default_rng((request.rid, len(request.tokens)))
        if rng.random() < 0.2:
            return NOT_YET if rng.random() < 0.5 else NO_TOKEN
        bits = rng.random(VOCAB) < rng.choice([0.01, 0.5, 0.99])
        bits[rng.integers(VOCAB)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def wait(self, seconds):
        return True


def one_row(i, prompt, table):
    params = RequestParams(SamplingParams(max_tokens=9, seed=i, **KINDS[i % 4]), 0.0)
    return Row(Request(i, 1, 0, params, prompt, len(prompt), block_table=table), 0, len(prompt), True)


def test_rows_with_masks_agree_with_the_cpu_engine(runner, model_dir):
    """Decodes and chunks, on the device and (with logprobs) on the host, beside rows without a mask."""
    results = []
    for engine in (runner, make_runner(model_dir)):
        rng, blocks = random.Random(6), count(1)
        rows = [one_row(i, rng.choices(range(5, 380), k=rng.randint(2, 12)), [next(blocks)]) for i in range(20)]
        first = engine.execute(StepPlan(rows, 0, masks=RandomMasks()))
        for row, token in zip(rows, first.tokens, strict=True):
            row.request.tokens.append(max(token, 5))
        decodes = [Row(r.request, len(r.request.tokens) - 1, 1, True) for r in rows[:11]]
        chunks = [Row(r.request, 0, len(r.request.tokens), i % 2 == 0) for i, r in enumerate(rows[11:])]
        results.append((first.tokens, engine.execute(StepPlan([*decodes, *chunks], 11, masks=RandomMasks())).tokens))
    assert results[0] == results[1]
    assert {NOT_YET, NO_TOKEN} <= {token for step in results[0] for token in step}


def test_many_masked_rows_are_sampled_part_by_part(model_dir, monkeypatch):
    monkeypatch.setattr("daemon.engine.cuda.masked_rows._CHUNK", 3 * VOCAB)
    small = harness.make_cuda_runner(model_dir, max_num_seqs=24, max_batch_tokens=256)
    test_rows_with_masks_agree_with_the_cpu_engine(small, model_dir)


def test_the_step_after_a_mask_waits_for_its_token(runner):
    row = one_row(0, [5, 6], [1])
    plan = StepPlan([row], 0, masks=RandomMasks())
    assert runner.blocks_overlap(plan)
    ticket = runner.launch(plan)
    assert runner.blocks_overlap(plan)
    with pytest.raises(ValueError, match="collect it first"):
        runner.launch(StepPlan([Row(row.request, 2, 1, True)], 1, masks=RandomMasks()))
    runner.collect(ticket)
