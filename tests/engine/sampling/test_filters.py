"""Cutoffs compared with a full sort; logprobs compared with float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.sampling import filters
from daemon.engine.sampling.noise import BLOCK


def block_maxima(logits):
    out = np.empty((len(logits), -(-logits.shape[1] // BLOCK)), np.float32)
    filters.find_maxima(logits.view(np.int32), 0, len(logits), out.view(np.int32))
    return out


def kept(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    """Return the ids of the candidates, by `find_cutoffs`, without those of -inf."""
    row = np.ascontiguousarray(logits, np.float32)[None]
    vocab = row.shape[1]
    floor, floor_id = np.empty(1, np.float32), np.empty(1, np.int64)
    depth = temperature * math.log(min_p) if min_p else -math.inf
    filters.find_cutoffs(
        row,
        block_maxima(row),
        0,
        1,
        np.array([1 / temperature], np.float32),
        np.array([depth], np.float32),
        np.array([top_k]),
        np.array([top_p]),
        floor,
        floor_id,
        np.empty(vocab, np.uint64),
        np.empty(vocab, np.int64),
    )
    ids = np.arange(vocab)
    stay = (row[0] > floor) | ((row[0] == floor) & (ids <= floor_id))
    return set(ids[stay & (row[0] > -np.inf)].tolist())


def kept_by_full_sort(logits, top_k, top_p, min_p, temperature):
    """Return (ids that a full sort in float64 keeps, ids so near top-p's limit that keeping them is optional)."""
    order = [i for i in np.lexsort((np.arange(len(logits)), -logits)).tolist() if logits[i] > -np.inf]
    largest = np.float32(min(logits[order[0]], np.finfo(np.float32).max))
    if min_p:
        least = largest + np.float32(temperature * math.log(min_p))
        order = [i for i in order if logits[i] >= least]
    if top_k:
        order = order[:top_k]
    if top_p == 1.0:
        return set(order), set()
    mass = np.exp((logits[order].astype(np.float64) - largest) / temperature)
    before = (np.cumsum(mass) - mass) / mass.sum()
    certain = {i for i, b in zip(order, before, strict=True) if b < top_p - 1e-6} | {order[0]}
    return certain, {i for i, b in zip(order, before, strict=True) if abs(b - top_p) <= 1e-6}


def random_logits(kind, size, rng):
    logits = rng.normal(size=size).astype(np.float32) * np.float32(0.2 if kind == "flat" else 4)
    if kind == "peaked":
        logits[rng.integers(0, size, 6)] += 18
    if kind == "steps":
        logits = np.round(logits) * np.float32(0.5)
    if kind == "holes":
        logits[rng.random(size) < 0.5] = -np.inf
        logits[rng.random(size) < 0.1] = np.nan
        logits[rng.integers(size)] = 2
    return logits


KINDS = st.sampled_from(["flat", "wide", "peaked", "steps", "holes"])


@settings(deadline=None, max_examples=300)
@given(
    KINDS,
    st.integers(1, 6000),
    st.integers(0, 10**9),
    st.sampled_from([0, 1, 2, 40, 900]),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    st.sampled_from([0.01, 0.7, 1.0, 3.0]),
)
def test_cutoffs_equal_those_of_a_full_sort(kind, size, seed, top_k, top_p, min_p, temperature):
    logits = random_logits(kind, size, np.random.default_rng(seed))
    certain, optional = kept_by_full_sort(logits, top_k, top_p, min_p, temperature)
    assert certain <= kept(logits, top_k, top_p, min_p, temperature) <= certain | optional


def test_of_equal_logits_at_the_cutoff_the_lowest_ids_stay():
    logits = np.array([1, 5, 3, 3, 5, 3, -2], np.float32)
    assert kept(logits, top_k=3) == {1, 4, 2}
    assert kept(np.zeros(1000), top_k=700) == set(range(700))
    assert kept(np.zeros(1000), top_p=0.25) == set(range(250))
    assert kept(np.array([-0.0, 0.0, -0.0]), top_k=2) == {0, 1}


def test_top_p_stops_at_an_exact_share():
    """Each of 8 equal tokens has exactly 1/8: the prefix ends where it reaches top_p, not one token later."""
    for n in range(1, 9):
        assert len(kept(np.zeros(8), top_p=n / 8)) == n


def test_top_k_applies_before_top_p():
    """top-p keeps half of the tokens that top-k kept, not half of all."""
    logits = np.zeros(100)
    assert kept(logits, top_k=10, top_p=0.5) == set(range(5))


def test_infinite_logits():
    assert kept([0, np.inf, 1, np.inf], top_p=0.4) == {1}
    assert kept([0, np.inf, 1, np.inf], top_k=2) == {1, 3}
    assert kept([0, -np.inf, np.nan], top_p=0.99) == {0}
    assert kept([3.3e38, -3.3e38, 0], min_p=0.5) == {0}


def test_a_row_without_candidates_has_no_cutoff():
    assert kept([-np.inf, np.nan], top_k=1, top_p=0.5) == set()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=60), st.integers(1, 700))
def test_select_prefix(pairs, target):
    keys = np.array([(v << 32) | i for i, (v, _) in enumerate(pairs)], np.uint64)
    weights = np.array([w for _, w in pairs], np.int64)
    order = np.argsort(keys)[::-1]
    total, expected = 0, len(keys)
    for n, i in enumerate(order):
        total += weights[i]
        if total >= target:
            expected = n + 1
            break
    front = keys[order[:expected]]
    got = filters.select_prefix(keys, weights, len(keys), target)
    assert got == expected
    assert set(keys[:got].tolist()) == set(front.tolist())
    assert keys[got - 1] == front.min()


@pytest.mark.parametrize("kind", ["flat", "wide", "peaked", "steps"])
def test_rank_row(kind):
    logits = random_logits(kind, 49_152, np.random.default_rng(3))[None]
    scratch = np.empty(49_152, np.uint64), np.empty(49_152, np.int64)
    top = np.empty(49_152, np.int64)
    for k in (0, 1, 20, 1000):
        log_total, n = filters.rank_row(logits, block_maxima(logits), 0, k, top, *scratch)
        exact = np.logaddexp.reduce(logits[0].astype(np.float64))
        assert abs(log_total - exact) < 5e-7
        assert top[: int(n)].tolist() == np.argsort(-logits[0], kind="stable")[:k].tolist()
