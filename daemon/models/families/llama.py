"""Llama 1 to 3.x, and the many models that use its architecture: the common decoder, with biases if they are set."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig, flag
from daemon.models.families.family import Family


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    bias = flag(config, "attention_bias")
    return replace(base, qkv_bias=bias, out_bias=bias, mlp_bias=flag(config, "mlp_bias"))


LLAMA = Family("llama", ("LlamaForCausalLM",), ("llama",), _describe)
