"""Qwen2 and Qwen2.5: a Llama with biases of query, key and value, and optionally a sliding window in upper layers."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import LayerConfig, ModelConfig
from daemon.models.config_values import RawConfig, flag
from daemon.models.families.family import Family, window_of, windowed_layers
from daemon.models.files import ModelError

WINDOW_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def qwen_layers(config: RawConfig, num_layers: int) -> tuple[LayerConfig, ...]:
    """Return the layers of a Qwen model: the first `max_window_layers` have full attention."""
    window = window_of(config) if flag(config, "use_sliding_window") else 0
    full = config["max_window_layers"]
    if not isinstance(full, int) or isinstance(full, bool):
        raise ModelError(f"max_window_layers is {full!r}; it must be a whole number")
    return windowed_layers(config, num_layers, window, lambda i: i >= full)


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    return replace(base, qkv_bias=True, layers=qwen_layers(config, base.num_layers))


QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    ("qwen2",),
    _describe,
    defaults=WINDOW_DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
)
