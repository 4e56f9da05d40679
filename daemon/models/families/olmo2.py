"""OLMo 2: the outputs of attention and MLP are normalised, not their inputs; queries and keys are, as whole rows."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig, flag
from daemon.models.families.family import Family


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    bias = flag(config, "attention_bias")
    return replace(base, qkv_bias=bias, out_bias=bias, norm_kind="post", qk_norm="row")


OLMO2 = Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), _describe, defaults={"rms_norm_eps": 1e-5})
