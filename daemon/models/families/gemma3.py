"""Gemma 3: five sliding layers and a full one in turn, each kind with its own rope; queries and keys are normalised.

Of the models that also see images, the language model is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daemon.models.architecture import ModelConfig, RopeConfig
from daemon.models.config_values import RawConfig, count, positive, refuse
from daemon.models.families.family import Family, Place, Shape, window_of, windowed_layers
from daemon.models.families.gemma2 import DEFAULTS, gemma
from daemon.models.rope_config import read_rope, rope_parameters

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _describe(base: ModelConfig, config: RawConfig) -> ModelConfig:
    refuse(config, "attn_logit_softcapping", "Gemma 3 has no cap of attention scores")
    every = count(config, "sliding_window_pattern")
    layers = windowed_layers(config, base.num_layers, window_of(config), lambda i: (i + 1) % every != 0, local_rope=1)
    # The length in config.json is the one after scaling.
    length = count(config, "max_position_embeddings")
    return replace(gemma(base, config), qk_norm="head", layers=layers, max_position=length)


def _ropes(config: RawConfig, head_dim: int) -> tuple[RopeConfig, ...]:
    parameters = rope_parameters(config)
    by_type = parameters if parameters.keys() & {_LOCAL, _GLOBAL} else {_GLOBAL: parameters}
    thetas = {
        _GLOBAL: positive(config, "rope_theta", 1e6),
        _LOCAL: positive(config, "rope_local_base_freq", 1e4),
    }
    return tuple(
        read_rope(config, head_dim, parameters=by_type.get(kind) or {}, theta=thetas[kind])
        for kind in (_GLOBAL, _LOCAL)
    )


def _places(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    """Return the names in a checkpoint without a vision tower, and with one, of Transformers 4 and 5."""
    inner = name.removeprefix("model.")
    names = (name, f"language_model.{name}", f"model.language_model.{inner}")
    return [Place(each, shape) for each in names]


GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ("gemma3_text", "gemma3"),
    _describe,
    defaults=DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
    ropes=_ropes,
    places=_places,
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    text_config="text_config",
)
