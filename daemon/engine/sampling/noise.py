"""CPU kernels for the sampling noise, and for sampling a token with it (Gumbel-max).

The noise of a token is a function of (seed, position, token id) only. It does not depend on the batch, the row, the
other candidates or earlier samples. So a request can continue on any engine, in any batch, and gets the same tokens.
The definition below is exact; other implementations must agree with it bit for bit.

**Word.** Philox4x32-10 (Salmon et al., SC'11: multipliers D2511F53 and CD9E8D57, key increments 9E3779B9 and
BB67AE85), with

    key     = (seed mod 2^32, seed div 2^32)            seed: 64-bit unsigned
    counter = (position, token id div 4, stream, 0)     32-bit each; position: index of the new token in the
                                                        sequence, prompt included; stream: 0 for sampling

The word w of a token is output lane (token id mod 4): an unsigned 32-bit integer.

**Gumbel noise.** v = (w + 0.5) / 2^32 and 1 - v are in the open interval (0, 1); both are exact in float64.
g = -log(-log(1 - v)) is computed in float64, then rounded once to float32. It is finite for every word: largest for
w = 0 (22.874), smallest for w = 2^32 - 1 (-3.129). log consists of correctly rounded float64 operations, never fused:

    x = f * 2^e with f in [0.5, 1); if f < 0.7071067811865476, f is doubled and e is decreased by 1
    s = (f - 1) / (f + 1), z = s * s
    t = 1/21; then t = t * z + 1/(2k + 1) for k = 9, 8, ..., 0       (each 1/n rounded to float64)
    log x = e * 0.6931471805599453 + (2 * s) * t

**Sampling.** The candidates have logits l in float32; m is the largest of them, and r = 1 / temperature rounded to
float32. The sampled token is the one with the largest score (l - m) * r + g, each operation rounded to float32; of
equal scores the one with the lowest id. A +inf logit counts as the largest finite float. NaN and -inf are never
sampled.
"""

from __future__ import annotations

import math

import numpy as np

from daemon.engine.jit import F32, F64, I64, U32, U64, kernel

BLOCK = 64
"""Tokens of one entry of the block maxima (`filters.find_maxima`) and of one batch of words."""

STREAM_DRAW = 0
"""Counter word 2 of Philox for sampling a token. Other uses of randomness need other numbers."""

MAX_NOISE = np.float32(22.88)
"""Upper bound of every token's noise."""

GREEDY = np.float32(0.0)
"""The `inverse_temperature` that selects the largest logit, without noise."""

_GROUPS = BLOCK // 4
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MUL0 = np.uint64(0xD2511F53)
_MUL1 = np.uint64(0xCD9E8D57)
_WEYL0 = np.uint64(0x9E3779B9)
_WEYL1 = np.uint64(0xBB67AE85)
_MAX_FLOAT = np.float32(np.finfo(np.float32).max)
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
# Larger than the rounding errors of noise and score, for scores that can still win.
_MARGIN = 1e-3


@kernel(inline=True)
def philox(c0: U64, c1: U64, c2: U64, c3: U64, seed: U64) -> tuple[U64, U64, U64, U64]:
    """Compute ten Philox rounds. Every value is a uint64 below 2^32, except the 64-bit `seed`."""
    k0 = seed & _LOW
    k1 = seed >> _HALF
    for _ in range(10):
        p0 = c0 * _MUL0
        p1 = c2 * _MUL1
        c0 = (p1 >> _HALF) ^ c1 ^ k0
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ c3 ^ k1
        c3 = p0 & _LOW
        k0 = (k0 + _WEYL0) & _LOW
        k1 = (k1 + _WEYL1) & _LOW
    return c0, c1, c2, c3


@kernel(inline=True)
def _log(x: F64) -> F64:
    """Return the log, as defined above, of a positive finite float64."""
    f, e = math.frexp(x)
    if f < _SQRT_HALF:
        f *= 2.0
        e -= 1
    s = (f - 1.0) / (f + 1.0)
    z = s * s
    t = 1.0 / 21.0
    for k in range(9, -1, -1):
        t = t * z + 1.0 / (2.0 * k + 1.0)
    return e * _LN2 + (2.0 * s) * t


@kernel(inline=True)
def gumbel(word: U32) -> F32:
    """Return the noise of a word, float32."""
    v = (np.float64(word) + 0.5) * 2.0**-32
    return np.float32(-_log(-_log(1.0 - v)))


@kernel(inline=True)
def _block_words(seed: U64, position: U64, block: I64, words: np.ndarray) -> None:
    """Write the words of the block's tokens to `words` (uint32[BLOCK]), token t at [t % 4 * 16 + t % BLOCK // 4].

    The order is lane-major: so the compiler computes many counters at a time and stores them contiguously.
    """
    first = np.uint64(block * _GROUPS)
    for j in range(_GROUPS):
        w0, w1, w2, w3 = philox(position, first + np.uint64(j), np.uint64(STREAM_DRAW), np.uint64(0), seed)
        words[j] = w0
        words[_GROUPS + j] = w1
        words[2 * _GROUPS + j] = w2
        words[3 * _GROUPS + j] = w3


@kernel(inline=True)
def _first_equal(logits: np.ndarray, value: F32, start: I64, stop: I64) -> I64:
    for i in range(start, stop):
        if logits[i] == value:
            return i
    return -1


@kernel(inline=True)
def _argmax(logits: np.ndarray, block_max: np.ndarray) -> I64:
    """Return the lowest id of the largest logit; -1 if no logit is above -inf."""
    best = 0
    for b in range(1, len(block_max)):
        if block_max[b] > block_max[best]:
            best = b
    if block_max[best] == -np.inf:
        return -1
    return _first_equal(logits, block_max[best], best * BLOCK, min((best + 1) * BLOCK, len(logits)))


@kernel(inline=True)
def _largest_word(gap: F32) -> U64:
    """Return the largest word with which a token can win that is `gap` below the best score so far.

    A noise of at least g needs -log(1 - v) <= exp(-g), and v <= -log(1 - v).
    """
    if gap <= _MARGIN:
        return _LOW
    return np.uint64(min(math.exp(_MARGIN - gap) * 2.0**32, 4294967295.0))


@kernel(inline=True)
def _scaled(logit: F32, largest: F32, inverse_temperature: F32) -> F32:
    return (min(logit, _MAX_FLOAT) - largest) * inverse_temperature


@kernel(inline=True)
def _sample(
    logits: np.ndarray,
    block_max: np.ndarray,
    floor: F32,
    floor_id: I64,
    inverse_temperature: F32,
    seed: U64,
    position: U64,
    words: np.ndarray,
) -> I64:
    """Sample a token as defined above, but skip most of the work.

    A block's words are computed only if its largest logit can still win, and a token's logarithms only if its word is
    small enough.
    """
    best = _argmax(logits, block_max)
    if best < 0 or inverse_temperature == GREEDY:
        return best
    largest = min(logits[best], _MAX_FLOAT)
    token = np.uint64(best)
    lanes = philox(position, token >> np.uint64(2), np.uint64(STREAM_DRAW), np.uint64(0), seed)
    score = gumbel(lanes[token & np.uint64(3)])
    for b in range(len(block_max)):
        if block_max[b] < floor:
            continue
        gap = score - _scaled(block_max[b], largest, inverse_temperature)
        if gap > MAX_NOISE + _MARGIN:
            continue
        _block_words(seed, position, b, words)
        limit = np.uint32(_largest_word(gap))
        hit = False
        for j in range(BLOCK):
            hit |= words[j] <= limit
        if not hit:
            continue
        for i in range(b * BLOCK, min((b + 1) * BLOCK, len(logits))):
            word = words[(i & 3) * _GROUPS + ((i & (BLOCK - 1)) >> 2)]
            if word > limit:
                continue
            logit = logits[i]
            if not logit >= floor or (logit == floor and i > floor_id):
                continue
            x = _scaled(logit, largest, inverse_temperature)
            if not x >= score - MAX_NOISE - _MARGIN or word > _largest_word(score - x):
                continue
            challenge = x + gumbel(word)
            if challenge > score or (challenge == score and i < best):
                score = challenge
                best = i
    return best


@kernel(
    "void(float32[:, ::1], float32[:, ::1], int64, int64, float32[::1], int64[::1], float32[::1],"
    " uint64[::1], int64[::1], int64[::1])"
)
def sample_rows(
    logits: np.ndarray,
    block_max: np.ndarray,
    start: int,
    stop: int,
    floor: np.ndarray,
    floor_id: np.ndarray,
    inverse_temperature: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    out: np.ndarray,
) -> None:
    """Sample a token for each of rows [start, stop) into `out` (int64[rows]); -1 if no logit is above -inf.

    logits: float32[rows, vocab]. block_max: float32[rows, ceil(vocab / BLOCK)], the result of `filters.find_maxima`.
    The candidates of a row are its logits above `floor` and those equal to it up to id `floor_id`; they must
    include the largest logit. floor, inverse_temperature: float32[rows]; floor_id, position: int64[rows];
    seed: uint64[rows].
    """
    words = np.empty(BLOCK, np.uint32)
    for row in range(start, stop):
        out[row] = _sample(
            logits[row],
            block_max[row],
            floor[row],
            floor_id[row],
            inverse_temperature[row],
            seed[row],
            np.uint64(position[row]),
            words,
        )
