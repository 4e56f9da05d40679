"""Seeds of the choices of one request. Pure."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def choice_seed(seed: int, choice: int) -> int:
    """H(seed, choice): the sampling seed of choice `choice` (0, 1, ...) of a request, in [0, 2^64).

    `seed` is any integer, taken modulo 2^64. For one seed all choices differ. Choice 0 is mixed like the others,
    so that users' small and sequential numbers never meet the seeds of somebody's choices.
    """
    return _mix(_mix(seed & _MASK) + 0x9E3779B97F4A7C15 * (choice + 1))


def _mix(x: int) -> int:
    """A bijection of 64-bit integers in which every input bit reaches every output bit (SplitMix64's)."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
