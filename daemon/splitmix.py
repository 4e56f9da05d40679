"""SplitMix64's finaliser, a hash of 64-bit integers. Pure."""

from __future__ import annotations

MASK64 = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment: 2^64 divided by the golden ratio, made odd."""


def mix64(x: int) -> int:
    """Return the hash of `x` modulo 2^64: a bijection in which every input bit affects every output bit."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
