"""Tables of angles for the rotary position embedding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.models.model_config import ModelConfig, ModelError


def rope_tables(config: ModelConfig, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return (cos, sin) of positions 0..length-1, each [length, head_dim / 2] float32."""
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies(config))
    return np.cos(angles), np.sin(angles)


def frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Return the radians per position, [head_dim / 2] float32, with the model's rope scaling.

    Raises ModelError if the type of scaling is unknown.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    kind = scaling["rope_type"]
    if kind == "linear":
        return plain / np.float32(scaling["factor"])
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise ModelError(f"rope scaling {kind!r} is not supported; llama3, linear and none are")


def _llama3(plain: npt.NDArray[np.float32], scaling: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between the two."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the original context length
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1 - keep) / scaling["factor"])).astype(np.float32)
