"""Phi-3, Phi-3.5 and Phi-4: a Llama whose checkpoints fuse query, key and value, and gate and up.

Some rotate only a part of each head, and have a rope of their own (longrope) for long contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daemon.models.architecture import LayerConfig, ModelConfig, RopeConfig
from daemon.models.config_values import RawConfig
from daemon.models.families.family import Family, Place, Shape, window_of
from daemon.models.rope_config import read_rope, rope_parameters


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    return replace(base, layers=(LayerConfig(window_of(config)),) * base.num_layers)


def _ropes(config: RawConfig, head_dim: int) -> tuple[RopeConfig, ...]:
    parameters = rope_parameters(config)
    if (parameters.get("rope_type") or parameters.get("type")) == "yarn":  # an early name of longrope here
        config = dict(config) | {"rope_parameters": parameters | {"rope_type": "longrope"}}
    return (read_rope(config, head_dim, partial=True),)


def _places(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, hidden = config.intermediate_size, config.hidden_size
    at, _, part = name.removesuffix(".weight").rpartition(".")
    begins = {"q_proj": 0, "k_proj": q, "v_proj": q + kv, "gate_proj": 0, "up_proj": inner}
    if part not in begins:
        return ()
    fused, rows = ("qkv_proj", q + 2 * kv) if part in ("q_proj", "k_proj", "v_proj") else ("gate_up_proj", 2 * inner)
    return (Place(f"{at}.{fused}.weight", (rows, hidden), begins[part], begins[part] + shape[0]),)


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    ("phi3",),
    _describe,
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ropes=_ropes,
    places=_places,
)
