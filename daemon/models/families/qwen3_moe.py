"""Qwen3 with a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from daemon.models.architecture import LayerConfig, ModelConfig
from daemon.models.config_values import RawConfig, count, flag
from daemon.models.families.experts import read_experts, stacked_experts
from daemon.models.families.family import Family, window_of
from daemon.models.files import ModelError


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    bias = flag(config, "attention_bias")
    window = window_of(config) if flag(config, "use_sliding_window") else 0
    sparse, dense = count(config, "decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ModelError(f"mlp_only_layers is {dense!r}; it must be a list of layers")
    layers = [LayerConfig(window, 0, i not in dense and (i + 1) % sparse == 0) for i in range(base.num_layers)]
    key = "num_experts" if "num_experts" in config else "num_local_experts"  # Transformers reads both
    width = count(config, "moe_intermediate_size")
    experts = read_experts(config, key, width=width, normalise=flag(config, "norm_topk_prob"))
    return replace(base, qkv_bias=bias, out_bias=bias, qk_norm="head", layers=tuple(layers), experts=experts)


QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    ("qwen3_moe",),
    _describe,
    defaults={
        "sliding_window": 4096,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    places=stacked_experts,
)
