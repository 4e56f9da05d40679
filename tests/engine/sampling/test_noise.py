"""Noise compared with its definition in numpy, and the pruned sampling compared with the full one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.params import choice_seed
from daemon.engine.sampling import filters, noise
from tests.engine.sampling.noise_kernels import gumbel_noise, token_words

M32 = 0xFFFFFFFF


def philox(counter, key):
    """Compute Philox4x32-10 with Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & M32, a >> 32 ^ c[3] ^ k[1], a & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


def reference_word(seed, position, token, stream=0):
    return philox((position, token >> 2, stream, 0), (seed & M32, seed >> 32))[token & 3]


def reference_log(x):
    f, e = np.frexp(x)
    low = f < 0.7071067811865476
    f, e = np.where(low, 2 * f, f), np.where(low, e - 1, e)
    s = (f - 1) / (f + 1)
    z = s * s
    t = np.full_like(z, 1 / 21)
    for k in range(9, -1, -1):
        t = t * z + 1 / (2 * k + 1)
    return e * 0.6931471805599453 + (2 * s) * t


def reference_noise(words):
    v = (words.astype(np.float64) + 0.5) * 2.0**-32
    return (-reference_log(-reference_log(1 - v))).astype(np.float32)


def words_of(seed, position, tokens, stream=0):
    out = np.empty(len(tokens), np.uint32)
    token_words(np.uint64(seed), position, stream, np.asarray(tokens, np.int32), out)
    return out


def reference_sample(logits, seed, position, inverse_temperature, floor=-np.inf, floor_id=None):
    """Sample as defined, without pruning: compute the noise of all tokens."""
    ids = np.arange(len(logits))
    kept = (logits > floor) | ((logits == floor) & (ids <= (len(logits) if floor_id is None else floor_id)))
    kept &= logits > -np.inf
    if not kept.any():
        return -1
    capped = np.minimum(logits, np.finfo(np.float32).max)
    with np.errstate(over="ignore", invalid="ignore"):
        x = (capped - capped[kept].max()) * np.float32(inverse_temperature)
    scores = x + reference_noise(words_of(seed, position, ids))
    assert scores.dtype == np.float32
    return int(np.argmax(np.where(kept, scores, -np.inf)))


def pruned_sample(logits, seed, position, inverse_temperature, floor=-np.inf, floor_id=None):
    logits = np.ascontiguousarray(logits, np.float32)[None]
    block_max = np.empty((1, -(-logits.shape[1] // noise.BLOCK)), np.float32)
    filters.find_maxima(logits.view(np.int32), 0, 1, block_max.view(np.int32))
    out = np.empty(1, np.int64)
    noise.sample_rows(
        logits,
        block_max,
        0,
        1,
        np.array([floor], np.float32),
        np.array([logits.shape[1] - 1 if floor_id is None else floor_id]),
        np.array([inverse_temperature], np.float32),
        np.array([seed], np.uint64),
        np.array([position]),
        out,
    )
    return int(out[0])


def test_published_philox_vectors():
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([M32] * 4, [M32] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, M32),
    st.integers(0, M32),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8),
)
def test_words_follow_the_definition(seed, position, stream, tokens):
    expected = [reference_word(seed, position, t, stream) for t in tokens]
    assert words_of(seed, position, tokens, stream).tolist() == expected


def test_noise_follows_the_definition_bit_for_bit():
    words = np.concatenate(
        [
            np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32),
            np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32),
            np.logspace(0, 9.6, 5000).astype(np.uint32),
        ]
    )
    got = np.empty(len(words), np.float32)
    gumbel_noise(words, got)
    assert (got.view(np.uint32) == reference_noise(words).view(np.uint32)).all()
    exact = [-math.log(-math.log1p(-(int(w) + 0.5) / 2**32)) for w in words]
    np.testing.assert_allclose(got, exact, rtol=1e-7, atol=1e-7)


def test_noise_is_finite_at_both_ends():
    ends = np.empty(2, np.float32)
    gumbel_noise(np.array([0, M32], np.uint32), ends)
    assert np.isfinite(ends).all()
    assert ends[0] < noise.MAX_NOISE
    assert ends[1] > -3.2


def test_words_are_uniform_over_tokens_positions_and_seeds():
    """The Kolmogorov-Smirnov test accepts the words as uniform, and neighbours do not correlate."""
    n = 40_000
    sequences = {
        "tokens": words_of(7, 3, range(n)),
        "positions": np.array([words_of(7, p, [11])[0] for p in range(n)]),
        "seeds": np.array([words_of(s, 3, [11])[0] for s in range(n)]),
        "choices": np.array([words_of(choice_seed(5, c), 3, [11])[0] for c in range(n)]),
    }
    for name, words in sequences.items():
        uniform = np.sort((words + 0.5) * 2.0**-32)
        distance = np.abs(uniform - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / math.sqrt(n), name  # p = 0.001
        centred = words * 2.0**-32 - 0.5
        for lag in (1, 2, 3, 4, 64):
            correlation = (centred[lag:] * centred[:-lag]).mean() * 12
            assert abs(correlation) < 4 / math.sqrt(n), (name, lag)


LOGIT_KINDS = st.sampled_from(["flat", "peaked", "equal", "steps", "holes"])


def make_logits(kind, size, rng):
    if kind == "equal":
        return np.zeros(size, np.float32)
    logits = rng.normal(size=size).astype(np.float32) * np.float32(0.3 if kind == "flat" else 3)
    if kind == "peaked":
        logits[rng.integers(0, size, 5)] += 15
    if kind == "steps":
        logits = np.round(logits)
    if kind == "holes":
        logits[rng.random(size) < 0.5] = -np.inf
        logits[rng.random(size) < 0.1] = np.nan
        logits[rng.integers(size)] = 1
    return logits


@settings(deadline=None, max_examples=300)
@given(
    LOGIT_KINDS,
    st.integers(1, 700),
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
    st.sampled_from([1e-5, 0.05, 0.7, 1.0, 2.0, 100.0]),
    st.booleans(),
)
def test_pruned_sampling_equals_full_sampling(kind, size, seed, position, temperature, has_cutoff):
    rng = np.random.default_rng(seed)
    logits = make_logits(kind, size, rng)
    args = [seed, position, np.float32(1 / temperature)]
    if has_cutoff:
        floor_id = int(rng.choice(np.flatnonzero(logits > -np.inf)))
        # If the largest logit is the floor, all logits equal to it must be candidates.
        args += [logits[floor_id], max(floor_id, int(np.nanargmax(logits)))]
    assert pruned_sample(logits, *args) == reference_sample(logits, *args)


def near_tie(seed, position, token, by):
    """Return logits of two candidates, 0 and `token`, such that the score of `token` is higher by about `by`."""
    words = words_of(seed, position, [0, token])
    first, second = reference_noise(words).tolist()
    logits = np.full(token + 1, -np.inf, np.float32)
    logits[0], logits[token] = 0, min(0.0, first - second + by)
    return logits


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
    st.sampled_from([2, 100, 5000]),
    st.sampled_from([0.0, 1e-6, -1e-6, 1e-4, -1e-4, 0.1]),
)
def test_pruning_is_exact_for_nearly_equal_scores(seed, position, size, by):
    token = 1 + int(words_of(seed, position, range(1, size)).argmin())
    logits = near_tie(seed, position, token, by)
    assert pruned_sample(logits, seed, position, 1.0) == reference_sample(logits, seed, position, 1.0)


def test_very_large_noise_wins_from_far_below():
    """Search 4 million words for the largest noise, about 15: pruning must not skip a token that can still win."""
    words = np.stack([words_of(0, position, range(1, 40_000)) for position in range(100)])
    position, token = (int(i) for i in np.unravel_index(words.argmin(), words.shape))
    token += 1
    assert words.min() < 6000
    for by in (1e-4, 1e-2):
        logits = near_tie(0, position, token, by)
        assert logits[token] < -10
        assert pruned_sample(logits, 0, position, 1.0) == token
        assert pruned_sample(near_tie(0, position, token, -by), 0, position, 1.0) == 0


def test_pruned_sampling_equals_full_sampling_for_a_real_vocabulary_size():
    rng = np.random.default_rng(1)
    for trial in range(40):
        logits = make_logits(["flat", "peaked", "steps", "holes"][trial % 4], 32_003, rng)
        assert pruned_sample(logits, trial, 17, 1.0) == reference_sample(logits, trial, 17, 1.0)


@pytest.mark.parametrize(
    "logits",
    [
        [0, 1e30, 3.3e38, -3.3e38],
        [np.inf, 0, np.inf, 1],
        [-np.inf, np.nan, -5, -np.inf],
        [np.nan, -np.nan, 1],
        [-3e38, -3e38, -np.inf],
        [-0.0, 0.0, -0.0],
        [1e-45, -1e-45, 0],
    ],
)
def test_extreme_logits_follow_the_definition(logits):
    logits = np.array(logits, np.float32)
    for seed in range(20):
        assert pruned_sample(logits, seed, 5, 1.0) == reference_sample(logits, seed, 5, 1.0)


def test_a_row_without_candidates_gives_minus_one():
    for logits in ([-np.inf] * 70, [np.nan] * 70, [np.nan, -np.inf]):
        assert pruned_sample(logits, 1, 1, 1.0) == -1
        assert pruned_sample(logits, 1, 1, noise.GREEDY) == -1


def test_greedy_takes_the_lowest_id_of_the_largest_logit():
    assert pruned_sample([1, 7, 7, 3] * 50, 0, 0, noise.GREEDY) == 1
    assert pruned_sample([1] * 130 + [7, 3, 7], 0, 0, noise.GREEDY) == 130


def test_choice_seeds_differ_and_stay_in_64_bits():
    seeds = {choice_seed(s, c) for s in range(-20, 200) for c in range(20)}
    assert len(seeds) == 220 * 20
    assert all(0 <= s < 2**64 for s in seeds)
    assert choice_seed(-1, 0) == choice_seed(2**64 - 1, 0)
    assert choice_seed(42, 0) != 42


def test_choice_seed_needs_neither_torch_nor_numba():
    import subprocess
    import sys

    code = "import sys, daemon.api.params; assert not {'torch', 'numba', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
