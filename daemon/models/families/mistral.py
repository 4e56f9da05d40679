"""Mistral: a Llama with a sliding window in all layers. Later models set it to null."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import LayerConfig, ModelConfig
from daemon.models.config_values import RawConfig
from daemon.models.families.family import Family, window_of


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    return replace(base, layers=(LayerConfig(window_of(config)),) * base.num_layers)


MISTRAL = Family(
    "mistral",
    ("MistralForCausalLM",),
    ("mistral",),
    _describe,
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
)
