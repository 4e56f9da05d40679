"""The stub runner: a fixed step time, and tokens that depend only on the position."""

import pytest

from daemon.engine.fake.stub import StubRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams


def request(length: int) -> Request:
    return Request(1, 1, 0, RequestParams(SamplingParams(max_tokens=9, seed=0), 0.0), [0] * length, length)


def test_a_step_waits_once_for_any_batch_and_samples_for_the_rows_with_sample():
    slept = []
    runner = StubRunner(step_seconds=0.02, vocab_size=1000, max_model_len=64, sleep=slept.append)
    runner.load(memoryview(bytearray(runner.pool_spec(4).nbytes)))
    rows = [Row(request(5), 4, 1, True), Row(request(9), 0, 4, False), Row(request(7), 0, 7, True)]
    result = runner.execute(StepPlan(rows, 1))
    assert slept == [0.02]
    assert len(result.tokens) == 2 and result.logprobs is None


def test_tokens_are_printable_and_the_same_for_a_resumed_request():
    runner = StubRunner(step_seconds=0, vocab_size=1000, max_model_len=500, sleep=lambda _: pytest.fail("slept"))
    decoded = [runner.execute(StepPlan([Row(request(n), n - 1, 1, True)], 1)).tokens[0] for n in range(1, 300)]
    prefilled = [runner.execute(StepPlan([Row(request(n), 0, n, True)], 0)).tokens[0] for n in range(1, 300)]
    assert decoded == prefilled
    assert all(chr(token).isprintable() for token in decoded)
    assert len(set(decoded)) > 50


def test_a_small_vocabulary_is_respected():
    runner = StubRunner(step_seconds=0, vocab_size=7, max_model_len=500)
    rows = [Row(request(n), n - 1, 1, True) for n in range(1, 100)]
    assert set(runner.execute(StepPlan(rows, 99)).tokens) == set(range(7))
