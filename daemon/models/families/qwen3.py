"""Qwen3: each head of queries and keys is normalised before it is rotated."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig, flag
from daemon.models.families.family import Family
from daemon.models.families.qwen2 import WINDOW_DEFAULTS, qwen_layers


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    bias = flag(config, "attention_bias")
    layers = qwen_layers(config, base.num_layers)
    return replace(base, qkv_bias=bias, out_bias=bias, qk_norm="head", layers=layers)


QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    ("qwen3",),
    _describe,
    defaults=WINDOW_DEFAULTS | {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768},
)
