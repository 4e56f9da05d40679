"""CPU kernels for min-p, top-k and top-p, which find the candidate tokens without sorting the vocabulary.

All three filters keep a prefix of one order: larger logits first, and of equal logits the lower id first. So together
they give one *cutoff*, a logit `floor` and a `floor_id`. The candidates are the logits above the floor, and those
equal to it up to that id. The filters apply in this order, each to the tokens that the previous one kept:

- min-p keeps logits >= m + temperature * log(min_p), with m the largest logit, rounded to float32;
- top-k keeps the first k;
- top-p keeps the shortest prefix that has at least the share top_p of the remaining probability.

Probabilities are integers: `_weight` is exp(x) in units of 2^-40, defined exactly in float32 operations, and a sum of
integers is the same in any order. So a cutoff depends only on the row's own logits, and not on the machine's vector
width. A probability below 2^-40 of the largest counts as 0. NaN is never kept.
"""

from __future__ import annotations

import math

import numpy as np

from daemon.engine.jit import F32, F64, I32, I64, U64, kernel
from daemon.engine.sampling.noise import BLOCK

UNIT = 2.0**-40
"""Probability of a weight of 1, relative to the largest token's."""

_MAX_FLOAT = np.float32(np.finfo(np.float32).max)
_NEG_INF_ORDER = np.int32(-2139095041)
_POS_INF_ORDER = np.int32(0x7F800000)
_SIGNLESS = np.int32(0x7FFFFFFF)
_LOG2E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that small multiples are exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LEAST = np.float32(-44.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1.0 / math.factorial(n)) for n in range(2, 8))
_MANTISSA = np.float32(2.0**24)
_BUCKETS = 1024
_BUCKETS_PER_UNIT = np.float32(23.25)  # maps [_LEAST, 0] to just under _BUCKETS
# Expected distance from the largest logit, in temperatures, of the nucleus of a peaked row.
_DEPTH = 6.0


@kernel(inline=True)
def _largest_order(bits: np.ndarray, n: I64) -> I32:
    """Return the largest of n floats, as an int32 that sorts like the floats. `bits`: the floats' bits.

    NaN counts as -inf. Compilers vectorise the maximum of integers, but not that of floats that may be NaN.
    """
    largest = _NEG_INF_ORDER
    for i in range(n):
        order = bits[i] ^ ((bits[i] >> np.int32(31)) & _SIGNLESS)
        order = _NEG_INF_ORDER if order > _POS_INF_ORDER else order
        largest = max(largest, order)
    return largest


@kernel("void(int32[:, ::1], int64, int64, int32[:, ::1])")
def find_maxima(logit_bits: np.ndarray, start: int, stop: int, block_max_bits: np.ndarray) -> None:
    """Find the largest logit of every block of BLOCK tokens, for rows [start, stop); -inf if all are NaN.

    logit_bits, block_max_bits: float32[rows, vocab] and float32[rows, ceil(vocab / BLOCK)], seen as int32.
    """
    for row in range(start, stop):
        for b in range(block_max_bits.shape[1]):
            bits = logit_bits[row, b * BLOCK : (b + 1) * BLOCK]
            # With a count known at compile time the loop is several times faster.
            largest = _largest_order(bits, BLOCK) if len(bits) == BLOCK else _largest_order(bits, len(bits))
            block_max_bits[row, b] = largest ^ ((largest >> np.int32(31)) & _SIGNLESS)


@kernel(inline=True)
def _weight(x: F32) -> I64:
    """Return exp(x) in UNITs as int64, for float32 x in [_LEAST, 0]."""
    n = np.int32(x * _LOG2E - _HALF)
    k = np.float32(n)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _C7
    for c in (_C6, _C5, _C4, _C3, _C2, _ONE, _ONE):
        p = p * r + c
    return (np.int64(np.int32(p * _MANTISSA)) << np.int64(16)) >> np.int64(-n)


@kernel(inline=True)
def _scaled(logit: F32, largest: F32, inverse_temperature: F32) -> F32:
    """Return (logit - largest) / temperature, a float32 clamped to [_LEAST, 0]; _LEAST for NaN."""
    logit = _MAX_FLOAT if logit > _MAX_FLOAT else logit
    x = (logit - largest) * inverse_temperature
    return x if x > _LEAST else _LEAST  # max() would return NaN for NaN


@kernel(inline=True)
def _sum_weights(logits: np.ndarray, n: I64, largest: F32, inverse_temperature: F32) -> I64:
    total = np.int64(0)
    for i in range(n):
        total += _weight(_scaled(logits[i], largest, inverse_temperature))
    return total


@kernel(inline=True)
def _total_weight(logits: np.ndarray, block_max: np.ndarray, largest: F32, inverse_temperature: F32) -> I64:
    """Return the sum of all tokens' weights."""
    total = np.int64(0)
    for b in range(len(block_max)):
        if _scaled(block_max[b], largest, inverse_temperature) <= _LEAST:
            continue
        block = logits[b * BLOCK : (b + 1) * BLOCK]
        if len(block) == BLOCK:
            total += _sum_weights(block, BLOCK, largest, inverse_temperature)
        else:
            total += _sum_weights(block, len(block), largest, inverse_temperature)
    return total


@kernel(inline=True)
def _largest(block_max: np.ndarray) -> F32:
    largest = block_max[0]
    for b in range(1, len(block_max)):
        largest = max(largest, block_max[b])
    return largest


@kernel(inline=True)
def _bound(block_max: np.ndarray, k: I64, floor: F32) -> F32:
    """Return the k-th largest block maximum, which at least k logits reach; `floor` if it is larger or k > blocks."""
    blocks = len(block_max)
    if k > blocks:
        return floor
    return max(floor, np.partition(block_max, blocks - k)[blocks - k])


@kernel(inline=True)
def _key(logit: F32, token: I64) -> U64:
    """Return a uint64, larger for tokens earlier in this module's order: the float, then the id's complement."""
    bits = np.float32(logit + np.float32(0.0)).view(np.int32)  # -0.0 equals 0.0
    order = bits ^ ((bits >> np.int32(31)) & _SIGNLESS)
    high = np.uint64(np.int64(order) + np.int64(1 << 31))
    return (high << np.uint64(32)) | np.uint64(0xFFFFFFFF - token)


@kernel(inline=True)
def _collect(logits: np.ndarray, block_max: np.ndarray, floor: F32, keys: np.ndarray) -> I64:
    """Write the key of every logit >= floor to `keys` (uint64), in order of ids. Return their number."""
    n = 0
    for b in range(len(block_max)):
        if block_max[b] < floor:
            continue
        for i in range(b * BLOCK, min((b + 1) * BLOCK, len(logits))):
            if logits[i] >= floor:
                keys[n] = _key(logits[i], i)
                n += 1
    return n


@kernel(inline=True)
def _id_of(key: U64) -> I64:
    return np.int64(0xFFFFFFFF) - np.int64(key & np.uint64(0xFFFFFFFF))


@kernel(inline=True)
def _weigh(
    logits: np.ndarray, keys: np.ndarray, n: I64, largest: F32, inverse_temperature: F32, weights: np.ndarray
) -> I64:
    """Write the weights of the first n keys' tokens to `weights` (int64). Return their sum."""
    total = np.int64(0)
    for j in range(n):
        weights[j] = _weight(_scaled(logits[_id_of(keys[j])], largest, inverse_temperature))
        total += weights[j]
    return total


@kernel(inline=True)
def _swap(keys: np.ndarray, weights: np.ndarray, i: I64, j: I64) -> None:
    keys[i], keys[j] = keys[j], keys[i]
    weights[i], weights[j] = weights[j], weights[i]


@kernel("int64(uint64[::1], int64[::1], int64, int64)")
def select_prefix(keys: np.ndarray, weights: np.ndarray, n: int, target: int) -> int:
    """Return the length of the shortest prefix, largest keys first, with a weight of at least `target`; or n.

    Moves that prefix to the front of `keys` (uint64, all different) and `weights` (int64, not negative). Its smallest
    key is the last there; the others have no order. Linear time on average: a quickselect by weight instead of rank.
    """
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) >> 1
        if keys[middle] > keys[low]:
            _swap(keys, weights, middle, low)
        if keys[high - 1] > keys[low]:
            _swap(keys, weights, high - 1, low)
        if keys[high - 1] > keys[middle]:
            _swap(keys, weights, high - 1, middle)
        pivot = keys[middle]
        _swap(keys, weights, middle, high - 1)
        end, above = low, np.int64(0)
        for j in range(low, high - 1):
            if keys[j] > pivot:
                above += weights[j]
                _swap(keys, weights, j, end)
                end += 1
        _swap(keys, weights, end, high - 1)
        if above >= target and end > low:
            high = end
        elif above + weights[end] >= target:
            return end + 1
        else:
            target -= above + weights[end]
            low = end + 1
    return high


@kernel(inline=True)
def _keep_first(keys: np.ndarray, weights: np.ndarray, n: I64, k: I64) -> I64:
    if k >= n:
        return n
    for j in range(n):
        weights[j] = 1
    return select_prefix(keys, weights, n, k)


@kernel(inline=True)
def _least(keys: np.ndarray, n: I64) -> U64:
    least = keys[0]
    for j in range(1, n):
        least = min(least, keys[j])
    return least


@kernel(inline=True)
def _nucleus_target(total: I64, top_p: F64) -> I64:
    return max(np.int64(1), min(total, np.int64(math.ceil(np.float64(total) * top_p))))


@kernel(inline=True)
def _bucket(x: F32) -> I32:
    """Return the bucket of x in [_LEAST, 0]: one of _BUCKETS equal intervals, bucket 0 at the largest logit."""
    return np.int32(-x * _BUCKETS_PER_UNIT)


@kernel(inline=True)
def _histogram(
    logits: np.ndarray, block_max: np.ndarray, largest: F32, inverse_temperature: F32, histogram: np.ndarray
) -> None:
    """Write the sum of the weights in each bucket to `histogram` (int64[_BUCKETS])."""
    histogram[:] = 0
    bucket = np.empty(BLOCK, np.int32)
    weight = np.empty(BLOCK, np.int64)
    for b in range(len(block_max)):
        if _scaled(block_max[b], largest, inverse_temperature) <= _LEAST:
            continue
        start, stop = b * BLOCK, min((b + 1) * BLOCK, len(logits))
        for i in range(start, stop):
            x = _scaled(logits[i], largest, inverse_temperature)
            bucket[i - start] = _bucket(x)
            weight[i - start] = _weight(x)
        for j in range(stop - start):
            histogram[bucket[j]] += weight[j]


@kernel(inline=True)
def _collect_bucket(
    logits: np.ndarray, block_max: np.ndarray, largest: F32, inverse_temperature: F32, bucket: I32, keys: np.ndarray
) -> I64:
    """Write the keys of one bucket's tokens to `keys`, as `_collect` does. Return their number."""
    n = 0
    for b in range(len(block_max)):
        if _bucket(_scaled(block_max[b], largest, inverse_temperature)) > bucket:
            continue
        for i in range(b * BLOCK, min((b + 1) * BLOCK, len(logits))):
            x = _scaled(logits[i], largest, inverse_temperature)
            if x > _LEAST and _bucket(x) == bucket:
                keys[n] = _key(logits[i], i)
                n += 1
    return n


@kernel(inline=True)
def _nucleus_by_histogram(
    logits: np.ndarray,
    block_max: np.ndarray,
    largest: F32,
    inverse_temperature: F32,
    target: I64,
    keys: np.ndarray,
    weights: np.ndarray,
) -> U64:
    """Return the last key of the prefix with the weight `target`: find its bucket, then search only there."""
    histogram = np.empty(_BUCKETS, np.int64)
    _histogram(logits, block_max, largest, inverse_temperature, histogram)
    bucket = 0
    while histogram[bucket] < target:
        target -= histogram[bucket]
        bucket += 1
    n = _collect_bucket(logits, block_max, largest, inverse_temperature, bucket, keys)
    _weigh(logits, keys, n, largest, inverse_temperature, weights)
    return keys[select_prefix(keys, weights, n, target) - 1]


@kernel(inline=True)
def _nucleus(
    logits: np.ndarray,
    block_max: np.ndarray,
    largest: F32,
    inverse_temperature: F32,
    top_p: F64,
    keys: np.ndarray,
    weights: np.ndarray,
) -> U64:
    """Return the last key that top-p keeps of the whole vocabulary. A peaked row needs no histogram."""
    total = _total_weight(logits, block_max, largest, inverse_temperature)
    target = _nucleus_target(total, top_p)
    floor = max(np.float32(largest - _DEPTH / inverse_temperature), -_MAX_FLOAT)
    near = 0
    for b in range(len(block_max)):
        near += block_max[b] >= floor
    if near * 8 <= len(block_max):
        n = _collect(logits, block_max, floor, keys)
        if _weigh(logits, keys, n, largest, inverse_temperature, weights) >= target:
            return keys[select_prefix(keys, weights, n, target) - 1]
    return _nucleus_by_histogram(logits, block_max, largest, inverse_temperature, target, keys, weights)


@kernel(
    "void(float32[:, ::1], float32[:, ::1], int64, int64, float32[::1], float32[::1], int64[::1], float64[::1],"
    " float32[::1], int64[::1], uint64[::1], int64[::1])"
)
def find_cutoffs(
    logits: np.ndarray,
    block_max: np.ndarray,
    start: int,
    stop: int,
    inverse_temperature: np.ndarray,
    min_p_depth: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    floor: np.ndarray,
    floor_id: np.ndarray,
    keys: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Write the cutoffs of rows [start, stop) to `floor` (float32[rows]) and `floor_id` (int64[rows]).

    logits: float32[rows, vocab]; block_max: the result of `find_maxima`; inverse_temperature: float32[rows], rows
    with 0 (greedy) are skipped; min_p_depth: float32[rows], temperature * log(min_p), -inf: no min-p; top_k:
    int64[rows], 0: all tokens; top_p: float64[rows], 1: all tokens. keys, weights: uint64[vocab], int64[vocab],
    working memory.
    """
    vocab = logits.shape[1]
    for row in range(start, stop):
        floor[row], floor_id[row] = -np.inf, vocab - 1
        k = top_k[row] if 0 < top_k[row] < vocab else vocab
        filtered = min_p_depth[row] > -np.inf or k < vocab
        largest = min(_largest(block_max[row]), _MAX_FLOAT)
        if inverse_temperature[row] == 0 or largest == -np.inf or not (filtered or top_p[row] < 1.0):
            continue
        if filtered:
            least = max(largest + min_p_depth[row], -_MAX_FLOAT)
            n = _collect(logits[row], block_max[row], _bound(block_max[row], k, least), keys)
            n = _keep_first(keys, weights, n, k)
            if top_p[row] < 1.0:
                total = _weigh(logits[row], keys, n, largest, inverse_temperature[row], weights)
                n = select_prefix(keys, weights, n, _nucleus_target(total, top_p[row]))
            last = _least(keys, n)
        else:
            last = _nucleus(logits[row], block_max[row], largest, inverse_temperature[row], top_p[row], keys, weights)
        floor_id[row] = _id_of(last)
        floor[row] = logits[row, floor_id[row]]


@kernel("UniTuple(float64, 2)(float32[:, ::1], float32[:, ::1], int64, int64, int64[::1], uint64[::1], int64[::1])")
def rank_row(
    logits: np.ndarray,
    block_max: np.ndarray,
    row: int,
    k: int,
    top_ids: np.ndarray,
    keys: np.ndarray,
    weights: np.ndarray,
) -> tuple[float, float]:
    """Write a row's k likeliest ids to `top_ids`, in order; return (log of the sum of exp(logit), number of ids).

    The error of the first is about 1e-7, as that of float32 logits; it is -inf if no logit is above -inf. The
    arguments are those of `find_cutoffs`; top_ids: int64, k or longer. Fewer than k ids are written if fewer are
    above -inf.
    """
    largest = min(_largest(block_max[row]), _MAX_FLOAT)
    if largest == -np.inf:
        return -np.inf, 0.0
    total = _total_weight(logits[row], block_max[row], largest, _ONE)
    n = 0
    if k > 0:
        n = _collect(logits[row], block_max[row], _bound(block_max[row], k, -_MAX_FLOAT), keys)
        n = _keep_first(keys, weights, n, k)
        ranked = np.sort(keys[:n])
        for j in range(n):
            top_ids[j] = _id_of(ranked[n - 1 - j])
    return largest + math.log(total * UNIT), np.float64(n)
