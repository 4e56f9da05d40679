"""Gemma 2: every other layer slides, scores and logits are capped, norms stand before and after attention and MLP.

The stored weight w of a norm means 1 + w.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig, flag, positive, refuse
from daemon.models.families.family import Family, window_of, windowed_layers
from daemon.models.files import ModelError

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}


def gemma(base: ModelConfig, config: RawConfig) -> ModelConfig:
    """Return what Gemma 2 and 3 have in common."""
    activation = config["hidden_activation"]
    if activation != "gelu_pytorch_tanh":
        raise ModelError(f"hidden_activation is {activation!r}; supported is 'gelu_pytorch_tanh'")
    refuse(config, "use_bidirectional_attention", "only causal attention is supported")
    bias = flag(config, "attention_bias")
    return replace(
        base,
        qkv_bias=bias,
        out_bias=bias,
        activation="gelu_tanh",
        norm_kind="sandwich",
        norm_offset=1.0,
        query_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
        embedding_scale=base.hidden_size**0.5,
        logits_softcap=cap(config, "final_logit_softcapping"),
    )


def cap(config: RawConfig, key: str) -> float:
    """Return a soft cap; 0 if the key is missing or null."""
    return 0.0 if config.get(key) is None else positive(config, key)


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    layers = windowed_layers(config, base.num_layers, window_of(config), lambda i: i % 2 == 0)
    softcap = cap(config, "attn_logit_softcapping")
    return replace(gemma(base, config), layers=layers, attention_softcap=softcap)


GEMMA2 = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    ("gemma2",),
    _describe,
    defaults=DEFAULTS
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
)
