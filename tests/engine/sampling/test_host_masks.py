"""Masks of grammars in the sampler: only their tokens are sampled, whatever else a request asks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, NOT_YET
from daemon.engine.sampling.sampler import Sampler
from daemon.ipc.messages import RequestParams, SamplingParams

VOCAB = 300


def request(rid: int, grammar: str = "g", **options: object) -> Request:
    sampling = SamplingParams(max_tokens=100, grammar=grammar, **({"seed": rid} | options))
    return Request(rid, 0, 0, RequestParams(sampling, 0.0), [1, 2, 3], 2)


class Masks:
    """Masks by rid: the ids of the tokens that are allowed, or what stands for the row's token."""

    def __init__(self, allowed: dict[int, set[int] | int]) -> None:
        self._allowed = allowed

    def of(self, of: Request) -> np.ndarray | int:
        allowed = self._allowed[of.rid]
        if isinstance(allowed, int):
            return allowed
        bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        bits[list(allowed)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


OPTIONS = [
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_p": 0.1},
    {"min_p": 0.9},
    {"logit_bias": ((7, 100.0), (8, -100.0)), "logprobs": 2},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": -1.0},
]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.integers(0, 10**6))
def test_a_sampled_token_is_one_of_the_mask(allowed, seed):
    requests = [request(i, seed=seed + i, **options) for i, options in enumerate(OPTIONS)]
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    before = logits.clone()
    result = Sampler(VOCAB, 1, (0,)).sample(logits, requests, Masks(dict.fromkeys(range(len(requests)), allowed)))
    assert set(result.tokens) <= allowed
    assert result.tokens[0] == max(sorted(allowed), key=lambda t: float(before[0, t]))
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    plain, masked = request(0, "", logprobs=3), request(1, logprobs=3)
    result = Sampler(VOCAB).sample(torch.stack([logits[0], logits[0]]), [plain, masked], Masks({1: {5}}))
    assert result.tokens[1] == 5 and result.logprobs is not None
    raw = torch.log_softmax(logits[0].double(), 0)
    assert result.logprobs[1].logprob == pytest.approx(float(raw[5]), abs=1e-5)
    assert result.logprobs[1].top_ids == result.logprobs[0].top_ids


def test_other_rows_are_the_same_beside_a_mask():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    plain = [request(i, "") for i in range(3)]
    alone = Sampler(VOCAB).sample(logits.clone(), plain).tokens
    mixed = [plain[0], request(1), plain[2]]
    beside = Sampler(VOCAB).sample(logits.clone(), mixed, Masks({1: set(range(VOCAB))})).tokens
    assert beside == alone  # a mask of all tokens changes nothing


@pytest.mark.parametrize("stands_for", [NO_TOKEN, NOT_YET])
def test_a_row_without_a_mask_gets_no_token(stands_for):
    rows = [request(0), request(1, "")]
    result = Sampler(VOCAB).sample(torch.zeros(2, VOCAB), rows, Masks({0: stands_for}))
    assert result.tokens[0] == stands_for and result.tokens[1] >= 0
    assert Sampler(VOCAB).sample(torch.zeros(1, VOCAB), [request(0)]).tokens == [NO_TOKEN]
