"""The device's samplers against the CPU's, token by token.

Tested are torch's version, and the kernel's sources compiled for the CPU, where the row algorithm runs with real
threads and barriers.
"""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.sampler import TorchSampler
from daemon.engine.jit import kernel
from daemon.engine.runner import NO_TOKEN
from daemon.engine.sampling import filters, noise
from daemon.ipc.messages import SamplingParams
from tests.engine.cuda.draws import KINDS, cpu_tokens, make_logits, many_rows, params_of, samplings
from tests.engine.sampling.noise_kernels import gumbel_noise, token_words

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def host(host_library):
    """The kernel's sources as a library; a team of threads replaces the GPU."""
    return ctypes.CDLL(str(host_library("draw")))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def each(function, *arrays, dtype):
    """Return `function` (host_draw.cpp) of each entry of the arrays."""
    out = np.empty(len(arrays[0]), dtype)
    function(*map(pointer, arrays), pointer(out), ctypes.c_int64(len(out)))
    return out


def host_tokens(host, logits, params, blocks=1, threads=1):
    rows, vocab = logits.shape
    out = np.empty(rows, np.int32)
    host.draw_rows(
        pointer(logits),
        ctypes.c_int64(rows),
        ctypes.c_int64(vocab),
        *(pointer(t.numpy()) for t in params),
        pointer(out),
        ctypes.c_uint32(blocks),
        ctypes.c_uint32(threads),
    )
    return out.tolist()


def torch_tokens(logits, params):
    return TorchSampler(len(logits), logits.shape[1], "cpu").sample(torch.from_numpy(logits), params).tolist()


# -- whole rows

rows_of_all_kinds = st.lists(
    st.tuples(st.sampled_from(KINDS), samplings(), st.integers(1, 300)), min_size=1, max_size=6
)


def built(rows, size, seed):
    rng = np.random.default_rng(seed)
    logits = np.stack([make_logits(kind, size, rng) for kind, _, _ in rows])
    sampling, positions = [s for _, s, _ in rows], [p for _, _, p in rows]
    return logits, params_of(sampling, positions), cpu_tokens(logits, sampling, positions)


@settings(deadline=None, max_examples=150)
@given(rows_of_all_kinds, st.integers(1, 5000), st.integers(0, 10**9))
def test_torch_samples_the_tokens_of_the_cpu(rows, size, seed):
    logits, params, tokens = built(rows, size, seed)
    assert torch_tokens(logits, params) == tokens


@settings(deadline=None, max_examples=300)
@given(rows=rows_of_all_kinds, size=st.integers(1, 5000), seed=st.integers(0, 10**9))
def test_the_row_algorithm_samples_the_tokens_of_the_cpu(host, rows, size, seed):
    logits, params, tokens = built(rows, size, seed)
    assert host_tokens(host, logits, params) == tokens


@settings(deadline=None, max_examples=60)
@given(
    rows=rows_of_all_kinds,
    size=st.integers(1, 3000),
    seed=st.integers(0, 10**9),
    blocks=st.integers(1, 4),
    threads=st.integers(1, 3),
)
def test_tokens_do_not_depend_on_the_team(host, rows, size, seed, blocks, threads):
    logits, params, tokens = built(rows, size, seed)
    assert host_tokens(host, logits, params, blocks, threads) == tokens


@pytest.mark.parametrize(("vocab", "rows"), [(32_003, 33), (128_256, 11)])
def test_vocabularies_of_real_size(host, vocab, rows):
    logits, sampling, positions = many_rows(vocab, np.random.default_rng(vocab), rows)
    params, tokens = params_of(sampling, positions), cpu_tokens(logits, sampling, positions)
    assert host_tokens(host, logits, params) == tokens
    assert host_tokens(host, logits[:11], params.rows(0, 11), 3, 2) == tokens[:11]
    assert torch_tokens(logits[:11], params.rows(0, 11)) == tokens[:11]


def test_ties_on_the_edge_of_a_cutoff(host):
    """The cutoff is among many equal logits: the lower ids stay."""
    rng = np.random.default_rng(0)
    logits = np.stack([rng.permutation(np.repeat(np.float32([3, 1, 1, 0, -2]), 100)) for _ in range(200)])
    sampling = [SamplingParams(max_tokens=1, seed=i, top_k=80 + 2 * i, top_p=0.5 + i / 500) for i in range(200)]
    params, tokens = params_of(sampling, range(1, 201)), cpu_tokens(logits, sampling, range(1, 201))
    assert host_tokens(host, logits, params) == tokens
    assert torch_tokens(logits, params) == tokens


def test_noise_is_exact_to_the_last_bit(host):
    """In many flat rows a wrong last bit of the noise changes a token."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(200, 2000)).astype(np.float32) * np.float32(1e-6)
    sampling = [SamplingParams(max_tokens=1, seed=int(rng.integers(2**63))) for _ in range(200)]
    params, tokens = params_of(sampling, range(1, 201)), cpu_tokens(logits, sampling, range(1, 201))
    assert host_tokens(host, logits, params) == tokens
    assert torch_tokens(logits, params) == tokens


def test_of_equal_scores_the_lowest_id_wins(host):
    """Two candidates in each row. The lower logit is below the other by exactly the difference of their noise."""
    noises = np.empty((400, 2), np.float32)
    words = np.empty(2, np.uint32)
    for seed in range(400):
        token_words(np.uint64(seed), 5, noise.STREAM_DRAW, np.arange(2, dtype=np.int32), words)
        gumbel_noise(words, noises[seed])
    logits = noises.min(1, keepdims=True) - noises
    assert ((logits + noises)[:, 0] == (logits + noises)[:, 1]).sum() > 100
    sampling = [SamplingParams(max_tokens=1, seed=seed) for seed in range(400)]
    params, tokens = params_of(sampling, [5] * 400), cpu_tokens(logits, sampling, [5] * 400)
    assert host_tokens(host, logits, params) == tokens
    assert torch_tokens(logits, params) == tokens


# -- TorchSampler


def test_rows_are_processed_in_pieces(monkeypatch):
    monkeypatch.setattr("daemon.engine.cuda.sampler._CHUNK", 1000)
    logits, sampling, positions = many_rows(300, np.random.default_rng(5), 40)
    assert torch_tokens(logits, params_of(sampling, positions)) == cpu_tokens(logits, sampling, positions)


def test_the_result_is_written_to_out():
    logits, sampling, positions = many_rows(300, np.random.default_rng(6), 4)
    params, result = params_of(sampling, positions), torch.full((6,), 77, dtype=torch.int32)
    sampler = TorchSampler(4, 300, "cpu")
    own = sampler.sample(torch.from_numpy(logits), params)
    assert sampler.sample(torch.from_numpy(logits), params, result[1:5]).data_ptr() == result[1:].data_ptr()
    assert result.tolist() == [77, *own.tolist(), 77]


def test_a_row_without_a_possible_token_gives_no_token():
    logits = np.full((2, 9), -np.inf, np.float32)
    logits[1] = np.nan
    assert torch_tokens(logits, params_of([SamplingParams(max_tokens=1, seed=0)] * 2, [1, 1])) == [NO_TOKEN] * 2


def test_wrong_shapes_and_dtypes_are_rejected():
    logits, sampling, positions = many_rows(300, np.random.default_rng(7), 4)
    logits, params, sampler = torch.from_numpy(logits), params_of(sampling, positions), TorchSampler(4, 300, "cpu")
    for wrong in (logits[:, :299], logits.double(), logits.repeat(2, 1)):
        with pytest.raises(ValueError, match="logits"):
            sampler.sample(wrong, params)
    with pytest.raises(ValueError, match="int32"):
        sampler.sample(logits, params, torch.empty(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="top_p"):
        sampler.sample(logits, params._replace(top_p=params.top_p.float()))
    with pytest.raises(ValueError, match="inverse_temperature"):
        sampler.sample(logits, params.rows(0, 3))


# -- the arithmetic, bit for bit

ENDS = np.array([0, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)


@kernel("void(float32[::1], int64[::1])")
def cutoff_weights(x, out):
    for i in range(len(x)):
        out[i] = filters._weight(x[i])


@kernel("void(int64[::1], float64[::1], int64[::1])")
def cutoff_targets(totals, top_p, out):
    for i in range(len(totals)):
        out[i] = filters._nucleus_target(totals[i], top_p[i])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8),
)
def test_words(host, seed, position, stream, tokens):
    tokens = np.array(tokens, np.int32)
    expected, got = np.empty(len(tokens), np.uint32), np.empty(len(tokens), np.uint32)
    token_words(np.uint64(seed), position, stream, tokens, expected)
    host.words(
        ctypes.c_uint64(seed),
        ctypes.c_uint32(position),
        ctypes.c_uint32(stream),
        pointer(tokens),
        pointer(got),
        ctypes.c_int64(len(tokens)),
    )
    assert got.tolist() == expected.tolist()


def test_noise(host):
    words = np.concatenate(
        [
            ENDS,
            np.random.default_rng(0).integers(0, 2**32, 500_000, np.uint32),
            np.logspace(0, 9.6, 5000).astype(np.uint32),
        ]
    )
    expected = np.empty(len(words), np.float32)
    gumbel_noise(words, expected)
    got = each(host.gumbels, words, dtype=np.float32)
    assert (got.view(np.uint32) == expected.view(np.uint32)).all()
    assert (each(host.gumbels, words, dtype=np.float32) < noise.MAX_NOISE).all()


def test_weights(host):
    rng = np.random.default_rng(1)
    ends = np.float32([0, -0.0, -44, -1e-45, -1e-7, -0.34657, -0.34658, -27.7, -27.8])
    wide, near = np.float32(-44) * rng.random(300_000, np.float32), -(rng.random(100_000, np.float32) ** 8)
    x = np.concatenate([ends, wide, near])
    expected = np.empty(len(x), np.int64)
    cutoff_weights(x, expected)
    got = each(host.weights, x, dtype=np.int64)
    assert (got == expected).all()
    assert got.max() == 2**40  # fits in three parts of 14 bits


def test_orders(host):
    values = np.float32([-np.inf, -3e38, -1, -1e-45, 0.0, 1e-45, 1, 3e38, np.inf])
    orders = each(host.orders, values, dtype=np.uint32)
    assert (np.diff(orders.astype(np.int64)) > 0).all()
    minus_zero, nan, minus_nan = each(host.orders, np.float32([-0.0, np.nan, -np.nan]), dtype=np.uint32)
    assert (minus_zero, nan, minus_nan) == (orders[4], orders[0], orders[0])


def test_nucleus_targets(host):
    rng = np.random.default_rng(3)
    totals = np.concatenate([rng.integers(2**40, 2**58, 20_000), [2**40, 2**57 + 1, 2**57 - 1, 2**57 + 127]])
    top_p = np.where(rng.random(len(totals)) < 0.3, 1 - 2.0**-53, rng.random(len(totals)))
    top_p[:10] = 0.0
    expected = np.empty(len(totals), np.int64)
    cutoff_targets(totals, top_p, expected)
    assert each(host.nucleus_targets, totals, top_p, dtype=np.int64).tolist() == expected.tolist()


def test_words_above_the_limit_cannot_win(host):
    """The noise just above the limit is below the gap. The noise of the limit is about as large as the gap."""
    gaps = np.linspace(-1, 22.88, 5000, dtype=np.float32)
    limits = each(host.largest_words, gaps, dtype=np.uint32)
    above = np.minimum(limits.astype(np.int64) + 1, 2**32 - 1).astype(np.uint32)
    assert (each(host.gumbels, above, dtype=np.float32) < gaps)[limits < 2**32 - 1].all()
    assert (limits == 2**32 - 1)[gaps <= 0].all()
    largest_noise = each(host.gumbels, np.maximum(limits, 1) - 1, dtype=np.float32)
    assert (largest_noise > gaps - 0.1)[(gaps > 3) & (gaps < 20)].all()
