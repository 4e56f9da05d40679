"""The logprobs of prompts' tokens, on the CPU and on the device, compared with log_softmax."""

import numpy as np
import pytest
import torch

from daemon.engine import prompt_scores
from daemon.engine.cuda.scoring import PassScores
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.engine.sampling.scorer import Scorer
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.ipc.prompt_logprobs import record_bytes, unpack

VOCAB = 300


def row(tokens, start, scored, top):
    params = RequestParams(SamplingParams(max_tokens=1, seed=0, prompt_logprobs=top), 0.0)
    return Row(Request(1, 1, 0, params, tokens, len(tokens)), start, len(tokens) - start, True, 0, scored)


def on_cpu(rows, logits):
    step = Scorer(VOCAB).step(rows)
    for first in range(0, len(logits), 3):
        step.add(first, logits[first : first + 3])
    return step.records()


def on_device(rows, logits):
    scores = PassScores(rows, 0, VOCAB, torch.device("cpu"))
    for first in range(0, len(logits), 3):
        scores.add(first, logits[first : first + 3].clone())
    scores.fetch()
    return prompt_scores.records(rows, scores.on_host())


@pytest.fixture(params=[on_cpu, on_device])
def score(request):
    return request.param


def test_records_are_the_log_softmax_of_the_raw_logits(score):
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, VOCAB, 12).tolist(), rng.integers(0, VOCAB, 9).tolist()
    rows = [row(first, 2, range(4, 11), 5), row([1, 2], 0, range(0), -1), row(second, 0, range(8), 0)]
    logits = torch.from_numpy(rng.normal(size=(15, VOCAB)).astype(np.float32) * 6)
    expected = torch.log_softmax(logits.double(), 1)
    records = score(rows, logits)
    assert set(records) == {0, 2}
    found = unpack(records[0], record_bytes(5)) + unpack(records[2], record_bytes(0))
    for i, (entry, token) in enumerate(zip(found, first[5:12] + second[1:9], strict=True)):
        assert entry.logprob == pytest.approx(float(expected[i, token]), abs=2e-6)
        assert entry.rank == 1 + int((logits[i] > logits[i, token]).sum())
        top = expected[i].topk(5 if i < 7 else 0)
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=2e-6)


def test_numbers_that_json_lacks_do_not_occur(score):
    logits = torch.zeros(4, VOCAB)
    logits[0] = -torch.inf
    logits[1, 7], logits[2, 7] = torch.nan, torch.inf
    logits[3, 9] = -torch.inf
    tokens = [0, 7, 7, 7, 9]
    (data,) = score([row(tokens, 0, range(4), 2)], logits).values()
    for entry in unpack(data, record_bytes(2)):
        assert all(-9999.0 <= value <= 0.0 for value in (entry.logprob, *entry.top_logprobs))
        assert 1 <= entry.rank <= VOCAB
    assert unpack(data, record_bytes(2))[3].logprob == -9999.0


def test_a_token_outside_the_vocabulary_is_scored_lowest(score):
    (data,) = score([row([1, VOCAB + 5], 0, range(1), 0)], torch.zeros(1, VOCAB)).values()
    assert unpack(data, record_bytes(0))[0].logprob == -9999.0
