"""The rotary embedding in a config.json, in the keys of Transformers 5 and in older ones."""

from __future__ import annotations

import math
from typing import Any

from daemon.models.architecture import RopeConfig
from daemon.models.config_values import RawConfig, count, numbers, positive
from daemon.models.files import ModelError

THETA = 10000.0  # of Transformers, for most families
_KINDS = "linear, dynamic, llama3, yarn, longrope and none"


def rope_parameters(config: RawConfig) -> dict[str, Any]:
    """Return `rope_parameters` (Transformers 5) or `rope_scaling` (older): one object, or one for each layer type."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError("rope_parameters (or rope_scaling) is not an object")
    return parameters


def read_rope(
    config: RawConfig,
    head_dim: int,
    *,
    parameters: dict[str, Any] | None = None,
    theta: float = THETA,
    partial: bool = False,
) -> RopeConfig:
    """Return the rotary embedding of `config`, or of one of its layer types if `parameters` is given.

    `theta` is the default. `partial`: the family may rotate a part of each head. Raises ModelError.
    """
    if parameters is None:
        parameters = rope_parameters(config)
        theta = positive(config, "rope_theta", theta)
    theta = positive(parameters, "rope_theta", theta)
    rotary_dim = _rotary_dim(config, parameters, head_dim, partial)
    if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise ModelError(f"rope_parameters has {nested[0]!r} by itself; this family has one rope for all layers")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    match kind:
        case "default":
            return RopeConfig(theta, rotary_dim)
        case "linear":
            return RopeConfig(theta, rotary_dim, kind, positive(parameters, "factor"))
        case "dynamic":
            length = count(config, "max_position_embeddings")
            return RopeConfig(theta, rotary_dim, kind, positive(parameters, "factor"), length)
        case "llama3":
            return _llama3(config, parameters, theta, rotary_dim)
        case "yarn":
            return _yarn(config, parameters, theta, rotary_dim)
        case "longrope" | "su":
            return _longrope(config, parameters, theta, rotary_dim)
    raise ModelError(f"rope_type {kind!r} is not supported; supported are {_KINDS}")


def longest(config: RawConfig, rope: RopeConfig) -> int:
    """Return the longest sequence, in tokens: max_position_embeddings, times the factor where it is meant before
    scaling."""
    length = count(config, "max_position_embeddings")
    match rope.kind:
        case "linear" | "dynamic":
            return int(length * max(1.0, rope.factor))
        case "yarn":
            return max(length, int(rope.original_length * rope.factor))
    return length


def _rotary_dim(config: RawConfig, parameters: dict[str, Any], head_dim: int, partial: bool) -> int:
    values = [c["partial_rotary_factor"] for c in (parameters, config) if c.get("partial_rotary_factor") is not None]
    share = positive({"partial_rotary_factor": values[0]}, "partial_rotary_factor") if values else 1.0
    if share != 1.0 and not partial:
        raise ModelError(f"partial_rotary_factor is {share}; this family rotates whole heads")
    rotary_dim = int(head_dim * share)
    if share > 1.0 or rotary_dim < 2 or rotary_dim % 2:
        raise ModelError(f"partial_rotary_factor {share} of head_dim {head_dim} is {rotary_dim}; it must be even")
    return rotary_dim


def _original_length(config: RawConfig, parameters: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    outer = config.get(key)  # Phi-3 has it beside the parameters
    return count(
        {key: parameters.get(key) if outer is None else outer}, key, count(config, "max_position_embeddings")
    )


def _llama3(config: RawConfig, parameters: dict[str, Any], theta: float, rotary_dim: int) -> RopeConfig:
    factor, low, high = (positive(parameters, n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ModelError("llama3 rope scaling needs a high_freq_factor above its low_freq_factor")
    return RopeConfig(
        theta,
        rotary_dim,
        "llama3",
        factor,
        _original_length(config, parameters),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(config: RawConfig, parameters: dict[str, Any], theta: float, rotary_dim: int) -> RopeConfig:
    original = _original_length(config, parameters)
    factor = positive(parameters, "factor", count(config, "max_position_embeddings") / original)
    truncate = parameters.get("truncate", True)
    return RopeConfig(
        theta,
        rotary_dim,
        "yarn",
        factor,
        original,
        positive(parameters, "attention_factor", _yarn_attention(parameters, factor)),
        beta_fast=positive(parameters, "beta_fast", 32.0),
        beta_slow=positive(parameters, "beta_slow", 1.0),
        truncate=bool(truncate),
    )


def _yarn_attention(parameters: dict[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(positive(parameters, "mscale")) / scale(positive(parameters, "mscale_all_dim"))
    return scale(1.0)


def _longrope(config: RawConfig, parameters: dict[str, Any], theta: float, rotary_dim: int) -> RopeConfig:
    original = _original_length(config, parameters)
    factor = positive(parameters, "factor", count(config, "max_position_embeddings") / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return RopeConfig(
        theta,
        rotary_dim,
        "longrope",
        factor,
        original,
        positive(parameters, "attention_factor", attention),
        short_factors=numbers(parameters, "short_factor", rotary_dim // 2),
        long_factors=numbers(parameters, "long_factor", rotary_dim // 2),
    )
