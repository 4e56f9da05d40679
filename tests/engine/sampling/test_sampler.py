"""The sampler as a whole: distribution, independence of rows, resumed requests, logprobs, extreme values."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.errors import ApiError
from daemon.api.params import sampling_params
from daemon.api.request_body import decode_body
from daemon.api.schemas import CompletionRequest
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN
from daemon.engine.sampling import filters
from daemon.engine.sampling import sampler as sampler_module
from daemon.engine.sampling.sampler import MIN_LOGPROB, Sampler
from daemon.ipc.messages import RequestParams, SamplingParams

VOCAB = 300


def request(tokens=(1, 2, 3), prompt_len=2, rid=1, **options):
    sampling = SamplingParams(max_tokens=1000, **({"seed": 0} | options))
    return Request(rid, 0, 0, RequestParams(sampling, 0.0), list(tokens), prompt_len)


def random_logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(logits, req, **options):
    logits = torch.as_tensor(logits, dtype=torch.float32).reshape(1, -1)
    return Sampler(logits.shape[1], **options).sample(logits, [req]).tokens[0]


OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.02},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.001, "temperature": 1.5},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "logprobs": 3},
    {"min_tokens": 8, "stop_token_ids": (4,), "logprobs": 0},
]


def mixed_requests(seed=0):
    rng = np.random.default_rng(seed)
    return [
        request(rng.integers(0, VOCAB, 10 + i).tolist(), 5, rid=i, seed=int(rng.integers(2**63)), **options)
        for i, options in enumerate(OPTIONS)
    ]


# -- the distribution


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, []),
        ({"temperature": 0.5}, []),
        ({"temperature": 3.0}, []),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"min_tokens": 9}, [5]),
    ],
)
@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_token_frequencies_follow_the_softmax(options, masked, varied):
    n = 4000
    logits = torch.tensor([-1.0, 0.0, 0.5, 1.5, 2.0, 2.5])
    expected = logits.double() / options.get("temperature", 1.0)
    expected[masked] = -torch.inf
    expected = expected.softmax(0).numpy()
    if varied == "seeds":
        requests = [request(seed=s, **options) for s in range(n)]
    else:
        requests = [request([1] * (1 + p), 1 + p, seed=7, **options) for p in range(n)]
    tokens = Sampler(6, eos_token_ids=(5,)).sample(logits.repeat(n, 1), requests).tokens
    counts = np.bincount(tokens, minlength=6)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - n * expected)[possible] ** 2 / (n * expected)[possible]).sum()
    assert chi_square < 25  # five degrees of freedom or fewer: p < 0.0002


# -- a token depends only on logits, parameters and tokens


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(len(OPTIONS))), st.integers(1, len(OPTIONS)), st.sampled_from([1, 3]))
def test_rows_do_not_depend_on_their_neighbours(order, count, threads):
    requests, logits = mixed_requests(), random_logits(len(OPTIONS))
    rows = list(order[:count])
    alone = [Sampler(VOCAB, 1, (9,)).sample(logits[i : i + 1].clone(), [requests[i]]) for i in rows]
    together = Sampler(VOCAB, threads, (9,)).sample(logits[rows], [requests[i] for i in rows])
    assert together.tokens == [a.tokens[0] for a in alone]
    if together.logprobs is not None:
        assert together.logprobs == [a.logprobs[0] if a.logprobs else None for a in alone]


def test_sampling_changes_neither_requests_nor_logits():
    requests, logits = mixed_requests(), random_logits(len(OPTIONS))
    before = [list(r.tokens) for r in requests], logits.clone()
    Sampler(VOCAB, eos_token_ids=(9,)).sample(logits, requests)
    assert ([r.tokens for r in requests], True) == (before[0], torch.equal(logits, before[1]))


def model(tokens):
    """Return the logits of a toy model, which depend on the last two tokens."""
    return random_logits(1, seed=tokens[-2] * VOCAB + tokens[-1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_request_gets_the_same_tokens(options):
    def run(sampler, req, until):
        while len(req.tokens) < until:
            req.tokens.append(sampler.sample(model(req.tokens), [req]).tokens[0])
        return req.tokens

    whole = run(Sampler(VOCAB, eos_token_ids=(9,)), request(seed=99, **options), 30)
    busy = Sampler(VOCAB, eos_token_ids=(9,))
    for cut in (4, 11, 29):
        assert run(busy, request(whole[:cut], 2, seed=99, **options), 30) == whole


def test_seed_and_position_matter():
    logits = torch.zeros(VOCAB)
    seeds = {sample_one(logits, request(seed=s)) for s in range(50)}
    positions = {sample_one(logits, request([0] * n, 1)) for n in range(1, 50)}
    assert min(len(seeds), len(positions)) > 40


def test_seeds_are_taken_modulo_64_bits():
    logits = torch.zeros(VOCAB)
    assert sample_one(logits, request(seed=-1)) == sample_one(logits, request(seed=2**64 - 1))


# -- extreme parameters


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1e-6},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 0.0},
        {"min_p": 1.0},
    ],
)
def test_parameters_that_keep_one_token_are_greedy(options):
    logits = random_logits(20)
    requests = [request(seed=s, **options) for s in range(20)]
    assert Sampler(VOCAB).sample(logits, requests).tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": VOCAB},
        {"top_k": 10**9},
        {"top_k": -1},
        {"top_p": 1.0},
        {"min_p": 0.0},
    ],
)
def test_parameters_that_keep_all_tokens_change_nothing(options):
    logits = random_logits(20)
    plain = Sampler(VOCAB).sample(logits, [request(seed=s) for s in range(20)])
    assert Sampler(VOCAB).sample(logits, [request(seed=s, **options) for s in range(20)]) == plain


def test_bias_forbids_and_forces():
    logits = random_logits(1)
    assert sample_one(logits, request(logit_bias=((17, 1000.0),))) == 17
    best = int(logits.argmax())
    assert sample_one(logits, request(temperature=0.0, logit_bias=((best, -1000.0),))) != best


FLOAT_BOUNDS = [5e-324, 1e-300, 1e-46, 1.4e-45, 1e-40, 1.1754943508222875e-38, 1e-6, 1e-5, 1e-3, 1.0, 2.0, 100.0]
FLOAT_FIELDS = (
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@pytest.mark.parametrize("value", [*FLOAT_BOUNDS, 0.0, -0.0, *(-x for x in FLOAT_BOUNDS)])
@pytest.mark.parametrize("field", [*FLOAT_FIELDS, "logit_bias"])
def test_every_number_that_a_request_may_have_is_sampled(field, value):
    """Numbers are checked as float64 and used as float32, where 1e-46 is 0. Each is refused or gives tokens."""
    sent = {"3": value} if field == "logit_bias" else value
    body = msgspec.json.encode({"prompt": "x", "max_tokens": 9, field: sent})
    try:
        checked = decode_body(body, msgspec.json.Decoder(CompletionRequest))
    except ApiError as e:
        assert (e.status, e.param) == (400, field)
        return
    extreme = sampling_params(checked, 9, seed=4, choice=0)
    rows = [request(seed=1), request(rid=2), request(seed=3, rid=3)]
    rows[1].params = RequestParams(msgspec.structs.replace(extreme, logprobs=2), 0.0)
    logits = random_logits(3)
    alone = Sampler(VOCAB).sample(logits[[0, 2]], [rows[0], rows[2]]).tokens
    tokens, logprobs, *_ = Sampler(VOCAB).sample(logits, rows)
    assert [tokens[0], tokens[2]] == alone
    assert 0 <= tokens[1] < VOCAB
    assert all(np.isfinite([logprobs[1].logprob, *logprobs[1].top_logprobs]))


def test_a_temperature_that_is_zero_as_float32_is_greedy():
    logits = random_logits(1)
    assert sample_one(logits, request(temperature=1e-300)) == int(logits.argmax())


# -- a row that raises


@pytest.mark.parametrize("place", ["penalties", "rank", "logprobs"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_that_raises_gets_no_token_and_the_others_theirs(monkeypatch, place, threads):
    requests, logits = mixed_requests(), random_logits(len(OPTIONS))
    healthy = Sampler(VOCAB, threads, (9,)).sample(logits.clone(), requests)
    sampler = Sampler(VOCAB, threads, (9,))
    victim = 8  # has a bias and logprobs

    def fails_for_victim(work, is_victim):
        def go(*args):
            if is_victim(*args):
                raise ZeroDivisionError
            return work(*args)

        return go

    if place == "penalties":
        apply = fails_for_victim(sampler._penalties.apply, lambda _, r: r is requests[victim])
        monkeypatch.setattr(sampler._penalties, "apply", apply)
    elif place == "rank":
        monkeypatch.setattr(filters, "rank_row", fails_for_victim(filters.rank_row, lambda *a: a[2] == victim))
    else:
        chosen = logits[victim].numpy().copy()
        logprob = fails_for_victim(sampler_module._logprob, lambda row, *_: (row == chosen).all())
        monkeypatch.setattr(sampler_module, "_logprob", logprob)
    result = sampler.sample(logits, requests)
    assert result.tokens[victim] == NO_TOKEN
    for i in set(range(len(OPTIONS))) - {victim}:
        assert (result.tokens[i], result.logprobs[i]) == (healthy.tokens[i], healthy.logprobs[i])
    assert torch.equal(logits, random_logits(len(OPTIONS)))


# -- logprobs


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(len(OPTIONS), 5003)
    options = {"repetition_penalty": 1.5, "logit_bias": ((3, 50.0),), "temperature": 0.5, "top_k": 3}
    requests = [request(logprobs=k, seed=k, rid=k, **options) for k in range(len(OPTIONS))]
    tokens, logprobs, *_ = Sampler(5003).sample(logits, requests)
    exact = logits.double().log_softmax(-1)
    for row, (token, got) in enumerate(zip(tokens, logprobs, strict=True)):
        best = exact[row].topk(row)
        assert got.logprob == pytest.approx(exact[row, token].item(), abs=2e-6)
        assert got.top_ids == best.indices.tolist()
        assert got.top_logprobs == pytest.approx(best.values.tolist(), abs=2e-6)


def test_only_requests_with_logprobs_get_them():
    logits = random_logits(3)
    assert Sampler(VOCAB).sample(logits, [request()] * 3).logprobs is None
    got = Sampler(VOCAB).sample(logits, [request(), request(logprobs=0), request(logprobs=VOCAB + 50)]).logprobs
    assert got[0] is None
    assert got[1].top_ids == []
    assert len(got[2].top_ids) == VOCAB


def test_equal_logprobs_are_ordered_by_id():
    got = Sampler(200).sample(torch.zeros(1, 200), [request(logprobs=3)]).logprobs[0]
    assert got.top_ids == [0, 1, 2]


# -- extreme logits


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("logits", "possible"),
    [
        ([-np.inf] * 99 + [0.0], {99}),
        ([np.nan] * 99 + [-5.0], {99}),
        ([1e30] + [0.0] * 99, {0}),
        ([0.0] * 99 + [np.inf], {99}),
        ([-3e38] * 99 + [3e38], {99}),
    ],
)
def test_the_only_possible_token_is_sampled(options, logits, possible):
    options = {"logprobs": 5} | options
    result = Sampler(100).sample(torch.tensor([logits]), [request(**options)])
    assert set(result.tokens) == possible
    assert all(MIN_LOGPROB <= p <= 0 for p in [result.logprobs[0].logprob, *result.logprobs[0].top_logprobs])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_candidates_gives_no_token_and_does_not_affect_others(options, value):
    logits = torch.stack([torch.full((VOCAB,), value), random_logits(1)[0]])
    sampler = Sampler(VOCAB)
    requests = [request(**options), request(seed=3, rid=2)]
    result = sampler.sample(logits, requests)
    assert result.tokens == [NO_TOKEN, sample_one(logits[1], requests[1])]


def test_equal_logits_give_every_token():
    tokens = Sampler(10).sample(torch.zeros(500, 10), [request(seed=s) for s in range(500)]).tokens
    assert set(tokens) == set(range(10))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="vocabulary"):
        Sampler(VOCAB).sample(random_logits(1, VOCAB + 1), [request()])
    with pytest.raises(ValueError, match="requests"):
        Sampler(VOCAB).sample(random_logits(2), [request()])
    assert Sampler(VOCAB).sample(random_logits(0), []).tokens == []


def test_strided_and_bfloat16_logits_are_accepted():
    logits = random_logits(2)
    strided = torch.empty(VOCAB, 2).T
    strided.copy_(logits)
    requests = [request(seed=1), request(seed=2, presence_penalty=1.0)]
    assert Sampler(VOCAB).sample(strided, requests) == Sampler(VOCAB).sample(logits, requests)
    half = logits.bfloat16()
    assert Sampler(VOCAB).sample(half, requests) == Sampler(VOCAB).sample(half.float(), requests)


def test_warm_up_does_not_change_results():
    sampler = Sampler(VOCAB, threads=2)
    sampler.warm_up()
    assert sampler.sample(random_logits(1), [request()]) == Sampler(VOCAB).sample(random_logits(1), [request()])
