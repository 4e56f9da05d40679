"""Bias, penalties and min_tokens compared with a slow reference."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.request import Request
from daemon.engine.sampling.penalties import Penalties, restore
from daemon.ipc.messages import RequestParams, SamplingParams

VOCAB, EOS = 40, (2, 7)


def request(tokens, prompt_len, rid=1, epoch=0, **options):
    sampling = SamplingParams(max_tokens=100, seed=0, **options)
    return Request(rid, epoch, 0, RequestParams(sampling, 0.0), tokens, prompt_len)


def reference(logits, req):
    """Compute the changed logits in float64, token by token."""
    s, output = req.sampling, req.tokens[req.prompt_len :]
    out = []
    for token, raw in enumerate(logits.astype(np.float64)):
        logit = raw + dict(s.logit_bias).get(token, 0.0)
        if token in req.tokens:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        logit -= s.frequency_penalty * output.count(token)
        logit -= s.presence_penalty * (token in output)
        if len(output) < s.min_tokens and token in {*EOS, *s.stop_token_ids}:
            logit = -np.inf
        for word in s.bad_words:
            if token == word[-1] and [*output, token][-len(word) :] == list(word):
                logit = -np.inf
        if s.allowed_token_ids and token not in s.allowed_token_ids:
            logit = -np.inf
        out.append(logit)
    return np.array(out)


def apply_and_restore(penalties, logits, req):
    """Return the changed logits; check that `restore` gives back the original ones."""
    work = logits.copy()
    undo = penalties.apply(work, req)
    result = work.copy()
    restore(work, undo)
    assert (work.view(np.int32) == logits.view(np.int32)).all()
    return result


tokens_of = st.lists(st.integers(0, VOCAB - 1), max_size=60)
options_of = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.3, 2.0]),
        "frequency_penalty": st.sampled_from([-1.5, 0.4, 2.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.7]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 0.5, 100.0]), max_size=4
        ).map(lambda d: tuple(d.items())),
        "min_tokens": st.integers(0, 20),
        "stop_token_ids": st.sampled_from([(), (0, 39)]),
        "allowed_token_ids": st.sampled_from([(), (4,), (0, 1, 2, 3, 39, 99)]),
        "bad_words": st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    },
)


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), tokens_of, options_of, st.integers(0, 10**6))
def test_growing_requests_match_the_reference(prompt, output, options, seed):
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 5
    penalties = Penalties(VOCAB, EOS)
    req = request(list(prompt), len(prompt), **options)
    for token in [*output, 0]:
        np.testing.assert_allclose(
            apply_and_restore(penalties, logits, req), reference(logits, req), rtol=1e-5, atol=1e-4
        )
        req.tokens.append(token)


@settings(deadline=None)
@given(tokens_of, tokens_of, st.integers(0, 30), options_of)
def test_a_resumed_request_has_the_bits_of_one_that_never_moved(first, second, cut, options):
    """Counts may grow token by token, all at once on another engine, or after other tokens of the same request id."""
    logits = np.linspace(-4, 4, VOCAB, dtype=np.float32)
    tokens = [1, 2, 3, *first]
    source, destination = Penalties(VOCAB, EOS), Penalties(VOCAB, EOS)
    req = request([1, 2, 3], 3, **options)
    for token in first:
        apply_and_restore(source, logits, req)
        req.tokens.append(token)
    apply_and_restore(destination, logits, request([1, 2, 3, *second], 3, **options))
    resumed = request(list(tokens), 3, epoch=cut, **options)
    expected = apply_and_restore(source, logits, req)
    assert apply_and_restore(destination, logits, resumed).tobytes() == expected.tobytes()
    assert apply_and_restore(Penalties(VOCAB, EOS), logits, resumed).tobytes() == expected.tobytes()


def test_only_the_repetition_penalty_counts_the_prompt():
    logits = np.full(VOCAB, 2.0, np.float32)
    prompt_only = request([5, 9], 2, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    got = apply_and_restore(Penalties(VOCAB, EOS), logits, prompt_only)
    assert (got[5], got[9], got[0]) == (1.0, 1.0, 2.0)
    with_output = request([5, 9, 9, 9], 2, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    got = apply_and_restore(Penalties(VOCAB, EOS), logits, with_output)
    assert (got[5], got[9]) == (1.0, 1.0 - 0.25 - 1.0)


def test_min_tokens_masks_all_end_tokens_until_it_is_reached():
    logits = np.zeros(VOCAB, np.float32)
    req = request([5, 9], 1, min_tokens=2, stop_token_ids=(11,), ignore_eos=True)
    assert np.flatnonzero(apply_and_restore(Penalties(VOCAB, EOS), logits, req) == -np.inf).tolist() == [2, 7, 11]
    req.tokens.append(9)
    assert (apply_and_restore(Penalties(VOCAB, EOS), logits, req) == 0).all()


def test_ids_outside_the_vocabulary_change_nothing():
    memory = np.zeros(3 * VOCAB, np.float32)
    row = memory[VOCAB : 2 * VOCAB]
    req = request(
        [-1, VOCAB, 10**6, -1, VOCAB],
        3,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        min_tokens=9,
        logit_bias=((VOCAB, 5.0), (-1, 5.0)),
        stop_token_ids=(VOCAB, -3),
    )
    Penalties(VOCAB, (VOCAB + 1, -2)).apply(row, req)
    assert not memory.any()


def test_requests_without_penalties_leave_no_cached_data():
    penalties = Penalties(VOCAB, EOS)
    assert penalties.apply(np.zeros(VOCAB, np.float32), request([1, 2], 1)) == []
    req = request([1, 2], 1, presence_penalty=1.0, min_tokens=5)
    penalties.apply(np.zeros(VOCAB, np.float32), req)
    assert len(penalties._counts) == len(penalties._param_arrays) == 1
    del req
    assert len(penalties._counts) == len(penalties._param_arrays) == 0


def test_counts_can_outgrow_their_first_arrays():
    vocab = 300
    penalties = Penalties(vocab, EOS)
    req = request([1], 1, presence_penalty=1.0)
    for token in range(3, 200):  # more distinct tokens than the first arrays hold
        req.tokens.append(token)
        logits = np.zeros(vocab, np.float32)
        penalties.apply(logits, req)
        assert np.flatnonzero(logits).tolist() == req.tokens[1:]
