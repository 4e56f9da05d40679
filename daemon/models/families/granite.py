"""Granite 3: a Llama with four factors: of embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig, flag, positive
from daemon.models.families.family import Family


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    bias = flag(config, "attention_bias")
    return replace(
        base,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
        query_scale=positive(config, "attention_multiplier", 1.0),
        embedding_scale=positive(config, "embedding_multiplier", 1.0),
        residual_scale=positive(config, "residual_multiplier", 1.0),
        logits_divisor=positive(config, "logits_scaling", 1.0),
    )


GRANITE = Family("granite", ("GraniteForCausalLM",), ("granite",), _describe)
