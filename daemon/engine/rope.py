"""Rotary position embedding: the angles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.models.model_config import ModelConfig, ModelError


def rope_tables(config: ModelConfig, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(cos, sin) of positions 0..length-1, each [length, head_dim / 2] float32."""
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies(config))
    return np.cos(angles), np.sin(angles)


def frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Radians a position, [head_dim / 2] float32, after the model's scaling. ModelError if that is unknown."""
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
    """Slow frequencies are divided by `factor`, fast ones kept, those in between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1 - keep) / scaling["factor"])).astype(np.float32)
