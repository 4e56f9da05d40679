"""Tables of angles for the rotary position embedding."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from daemon.models.architecture import RopeConfig

Floats = npt.NDArray[np.float32]
_ONE = np.float32(1.0)


def rope_tables(rope: RopeConfig, length: int) -> tuple[Floats, Floats]:
    """Return (cos, sin) of positions 0..length-1, each [length, rotary_dim / 2] float32.

    `length` is that of the longest sequence. The kinds dynamic and longrope depend on it: keys are stored rotated, so
    all sequences of an engine need the same angles.
    """
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies(rope, length))
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def frequencies(rope: RopeConfig, length: int) -> Floats:
    """Return the radians per position, [rotary_dim / 2] float32, with the model's rope scaling."""
    match rope.kind:
        case "default":
            return _plain(rope, rope.theta)
        case "linear":
            return _plain(rope, rope.theta) / np.float32(rope.factor)
        case "dynamic":
            return _plain(rope, _dynamic_theta(rope, length))
        case "llama3":
            return _llama3(rope)
        case "yarn":
            return _yarn(rope)
        case "longrope":
            factors = rope.long_factors if length > rope.original_length else rope.short_factors
            return _plain(rope, rope.theta, np.array(factors, np.float32))


def _plain(rope: RopeConfig, theta: float, divisors: Floats | np.float32 = _ONE) -> Floats:
    """Return the frequencies without scaling, divided by `divisors`."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    return (1.0 / (divisors * np.float32(theta) ** exponents)).astype(np.float32)


def _dynamic_theta(rope: RopeConfig, length: int) -> float:
    """Return the base with which the slowest pair of a sequence of `length` turns as far as one of the original
    length did."""
    stretch = rope.factor * max(length, rope.original_length) / rope.original_length - (rope.factor - 1)
    return float(rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _llama3(rope: RopeConfig) -> Floats:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between the two."""
    plain = _plain(rope, rope.theta)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_length * plain / (2 * math.pi)  # in the original context length
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1 - keep) / rope.factor)).astype(np.float32)


def _yarn(rope: RopeConfig) -> Floats:
    """Divide the frequencies of pairs that turn seldom by `factor`, keep those of pairs that turn often, and blend in
    between: by the index of a pair."""
    dim = rope.rotary_dim

    def pair(turns: float) -> float:
        """Return the index, not rounded, of the pair that makes `turns` turns in the original context length."""
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    slow, plain = _plain(rope, rope.theta, np.float32(rope.factor)), _plain(rope, rope.theta)
    return (slow * ramp + plain * (1 - ramp)).astype(np.float32)
