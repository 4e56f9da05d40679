"""What the families read from config.json, where they find tensors, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.engine.weights import open_weights
from daemon.models.architecture import ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from daemon.models.families import FAMILIES as REGISTERED
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError, read_model_config
from daemon.models.tensors import expected_tensors
from tests.models.tiny_families import FAMILIES, LONG, ROPES, edit_config, make_tiny

pytestmark = pytest.mark.integration
LEAST: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}


def read(path: Path, architecture: str, **keys: Any) -> ModelConfig:
    """Return the configuration of a directory whose config.json has few keys."""
    (path / "config.json").write_text(json.dumps(LEAST | {"architectures": [architecture]} | keys))
    return read_model_config(path)


def test_every_family_has_a_model_in_the_tests() -> None:
    tested = {name.split(",")[0] for name in FAMILIES} | {"llama"}
    assert tested == set(REGISTERED)


@pytest.mark.parametrize("kind", [*FAMILIES, *ROPES])
def test_the_length_and_the_defaults_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """A directory without the keys that have a default reads the same as one with all of them."""
    from transformers import AutoConfig

    path = make_tiny(tmp_path, (FAMILIES | ROPES)[kind])
    written = read_model_config(path)
    reference = AutoConfig.from_pretrained(path)
    assert written.num_params == sum(torch.Size(shape).numel() for shape in matrices(written))
    assert written.head_dim == getattr(reference, "head_dim", None) or 16
    config = json.loads((path / "config.json").read_text())
    defaults = type(reference)().to_dict()
    keep = {
        "architectures",
        "model_type",
        "rope_parameters",
        "layer_types",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
    edit_config(path, **{key: "absent" for key in config.keys() - keep if config[key] == defaults.get(key)})
    assert read_model_config(path) == written


def matrices(config: ModelConfig) -> list[tuple[int, ...]]:
    return [shape for name, shape in expected_tensors(config).items() if name.endswith(".weight")]


def test_mixtures_count_all_experts_and_the_active_ones(tmp_path: Path) -> None:
    config = read_model_config(make_tiny(tmp_path, FAMILIES["mixtral"]))
    expert = 3 * 64 * 128
    assert config.num_params - config.active_params == 2 * (4 - 2) * expert
    assert config.mlp_width == 2 * 128
    assert config.linear_params == config.num_params - 2 * 384 * 64 - 2 * 4 * expert


def test_windows(tmp_path: Path) -> None:
    assert read(tmp_path, "MistralForCausalLM").layers == (LayerConfig(4096),) * 12
    assert read(tmp_path, "Qwen2ForCausalLM").layers == (LayerConfig(),) * 12
    qwen = {"use_sliding_window": True, "max_window_layers": 10, "sliding_window": 99}
    assert read(tmp_path, "Qwen2ForCausalLM", **qwen).layers == (LayerConfig(),) * 10 + (LayerConfig(99),) * 2
    gemma2 = read(tmp_path, "Gemma2ForCausalLM")
    assert [layer.window for layer in gemma2.layers] == [4096, 0] * 6
    gemma3 = read(tmp_path, "Gemma3ForCausalLM", sliding_window=512)
    assert gemma3.layers == ((LayerConfig(512, 1),) * 5 + (LayerConfig(),)) * 2
    assert [rope.theta for rope in gemma3.ropes] == [1e6, 1e4]


def test_gemma_scales_and_caps(tmp_path: Path) -> None:
    config = read(tmp_path, "Gemma2ForCausalLM", query_pre_attn_scalar=144, final_logit_softcapping=None)
    assert (config.query_scale, config.embedding_scale) == (1 / 12, 8.0)
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 0.0)
    assert (config.head_dim, config.tie_embeddings, config.max_position) == (256, True, 8192)


def test_gemma3_ropes_in_old_and_new_keys(tmp_path: Path) -> None:
    scaled = RopeConfig(1e6, 256, "linear", 8.0), RopeConfig(1e4, 256)
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    new = {"full_attention": old["rope_scaling"] | {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    for keys in (old, {"rope_parameters": new}):
        config = read(tmp_path, "Gemma3ForCausalLM", **keys)
        assert config.ropes == scaled
        assert config.max_position == 131072  # the length after scaling


def test_the_longest_sequence_after_scaling(tmp_path: Path) -> None:
    def longest(**rope: Any) -> int:
        return read(tmp_path, "LlamaForCausalLM", max_position_embeddings=1000, rope_scaling=rope).max_position

    assert longest(type="linear", factor=4.0) == 4000
    assert longest(type="dynamic", factor=2.5) == 2500
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=500) == 2000
    assert longest(rope_type="yarn", factor=2.0, original_max_position_embeddings=100) == 1000
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 125}
    assert longest(rope_type="llama3", factor=8.0, **llama3) == 1000


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_early_names_of_longrope(tmp_path: Path, name: str) -> None:
    scaling = {"type": name, "short_factor": [1.0] * 8, "long_factor": LONG}
    config = read(tmp_path, "Phi3ForCausalLM", rope_scaling=scaling, max_position_embeddings=131072)
    [rope] = config.ropes
    assert (rope.kind, rope.original_length, rope.factor, rope.long_factors) == ("longrope", 4096, 32.0, tuple(LONG))
    assert rope.attention_factor == pytest.approx(1.190238)


def test_a_model_that_also_sees_is_served_as_text(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, FAMILIES["gemma3"])
    plain = open_model(path)
    config = json.loads((path / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (path / "config.json").write_text(json.dumps(outer | {"eos_token_id": config.pop("eos_token_id")}))
    file = path / "model.safetensors"
    stored = load_file(file)
    for rename in ("language_model.{}".format, lambda name: name.replace("model.", "model.language_model.", 1)):
        tower = {"vision_tower.x": torch.ones(2), "multi_modal_projector.y": torch.ones(2)}
        save_file({rename(name): tensor for name, tensor in stored.items()} | tower, file, {"format": "pt"})
        opened = open_model(path)
        assert opened == plain
        weights = open_weights(opened, "auto")
        assert all(torch.equal(weights.get(name), stored[name]) for name in expected_tensors(opened))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_found(tmp_path: Path, kind: str) -> None:
    path = make_tiny(tmp_path, FAMILIES[kind])
    config, file = open_model(path), path / "model.safetensors"
    assert isinstance(config.experts, ExpertsConfig)
    weights = open_weights(config, "auto")
    canonical = {name: weights.get(name).clone() for name in expected_tensors(config)}
    stacked = {name: tensor for name, tensor in canonical.items() if ".experts." not in name}
    for i in range(config.num_layers):
        at = f"model.layers.{i}.mlp.experts"
        gates, ups, downs = (
            torch.stack([canonical[f"{at}.{e}.{part}_proj.weight"] for e in range(config.experts.count)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{at}.gate_up_proj": torch.cat([gates, ups], 1), f"{at}.down_proj": downs}
    save_file(stacked, file, {"format": "pt"})
    weights = open_weights(config, "auto")
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in canonical.items())


@pytest.mark.parametrize(
    ("kind", "missing"), [("phi3", "layers.1.mlp.gate_up_proj.weight"), ("mixtral", "block_sparse_moe.experts.3.w2")]
)
def test_a_missing_tensor_has_the_name_of_the_checkpoint(tmp_path: Path, kind: str, missing: str) -> None:
    path = make_tiny(tmp_path, FAMILIES[kind])
    file = path / "model.safetensors"
    stored = load_file(file)
    save_file({name: tensor for name, tensor in stored.items() if missing not in name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lack the tensor .*{missing}"):
        open_model(path)


def test_granite_factors(tmp_path: Path) -> None:
    config = read(tmp_path, "GraniteForCausalLM", attention_multiplier=0.015625, logits_scaling=8.0)
    assert (config.query_scale, config.logits_divisor, config.residual_scale) == (0.015625, 8.0, 1.0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 12}, "layer_types has 'chunked_attention'"),
    ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types must be a list of num_hidden_layers"),
    ("Gemma2ForCausalLM", {"sliding_window": "x"}, "sliding_window is 'x'"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("Gemma3ForConditionalGeneration", {"text_config": 3}, "text_config is not an object"),
    ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 12}, "sliding_window is not set"),
    ("Qwen2ForCausalLM", {"max_window_layers": None}, "max_window_layers is None"),
    ("Qwen3MoeForCausalLM", {"num_experts": 0}, "num_experts is 0"),
    ("Qwen3MoeForCausalLM", {"num_experts": 4}, "num_experts_per_tok is 8"),
    ("Qwen3MoeForCausalLM", {"num_experts": 8, "mlp_only_layers": 1}, "mlp_only_layers is 1"),
    (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "longrope", "long_factor": LONG}},
        "short_factor must be a list of 8",
    ),
    ("Phi3ForCausalLM", {"partial_rotary_factor": 0.2}, "partial_rotary_factor 0.2"),
    ("Qwen2ForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("GraniteForCausalLM", {"residual_multiplier": -1}, "residual_multiplier is -1"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic"}}, "factor is missing"),
    ("LlamaForCausalLM", {"rope_scaling": 4}, "rope_scaling"),
    ("Qwen3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "has 'full_attention'"),
]


@pytest.mark.parametrize(("architecture", "keys", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_cannot_be_served_names_the_key(
    tmp_path: Path, architecture: str, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        read(tmp_path, architecture, **keys)


def test_unknown_keys_do_not_change_a_model(tmp_path: Path) -> None:
    assert replace(read(tmp_path, "LlamaForCausalLM", spin=3)) == read(tmp_path, "LlamaForCausalLM")
