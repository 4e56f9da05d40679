"""Mixtral: a Mistral with a mixture of experts in each layer. Checkpoints name an expert's matrices w1, w3 and w2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daemon.models.architecture import LayerConfig, ModelConfig
from daemon.models.config_values import RawConfig
from daemon.models.families.experts import read_experts, stacked_experts
from daemon.models.families.family import Family, Place, Shape, window_of

_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    experts = read_experts(config, "num_local_experts", width=base.intermediate_size, normalise=True)
    return replace(base, layers=(LayerConfig(window_of(config), 0, True),) * base.num_layers, experts=experts)


def _places(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    if ".mlp." not in name:
        return ()
    old = name.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in _NAMES.items():
        old = old.replace(ours, theirs)
    return (Place(old, shape), *stacked_experts(config, name, shape))


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    ("mixtral",),
    _describe,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    places=_places,
)
