"""Small random models of each family, written by Transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.models.tiny_model import EOS_ID, write_tokenizer

VOCAB = 384
LONG = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,  # heads of 16 in all models: kernels are compiled once
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 96}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **parameters}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 37}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"hidden_size": 80, "head_dim": 16}),
    "qwen3, biases and windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 21,
            "max_window_layers": 0,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "norm_topk_prob": True, "head_dim": 16, "hidden_size": 80, **_EXPERTS},
    ),
    "qwen3_moe, some layers dense": (
        "Qwen3Moe",
        {"num_experts": 5, "mlp_only_layers": [0], **_EXPERTS},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 50}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 40, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "hidden_size": 80,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 45}),
    "phi3, part of a head rotated": (
        "Phi3",
        {"rope_parameters": _rope("default", partial_rotary_factor=0.75)},
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.7,
            "mlp_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
}
"""Transformers' class and its arguments, by name. What a window cuts, and what a rope scales, shows in the tests."""

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Llama", {"rope_parameters": _rope("linear", factor=4.0)}),
    "dynamic": ("Llama", {"rope_parameters": _rope("dynamic", factor=4.0)}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": _rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            )
        },
    ),
    "yarn": ("Qwen2", {"rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=64)}),
    "yarn, all parameters": (
        "Llama",
        {
            "rope_parameters": _rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=16.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.3,
                truncate=False,
            )
        },
    ),
    "longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": _rope(
                "longrope", short_factor=[1.1] * 8, long_factor=LONG, original_max_position_embeddings=64
            ),
        },
    ),
}
"""The same for each rope scaling. `max_position_embeddings` is set by the tests where the kind needs it."""


def make_tiny(directory: Path, kind: tuple[str, dict[str, Any]], *, seed: int = 0, **changes: Any) -> Path:
    """Write a model of `kind`, a value of `FAMILIES` or `ROPES`, with its tokenizer, and return its directory.

    All weights are random, norms and biases too: a missing one shows.
    """
    import transformers

    name, arguments = kind
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**(_COMMON | arguments | changes)))
    _randomise(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    write_tokenizer(directory, VOCAB)
    return directory


def edit_config(path: Path, **changes: Any) -> None:
    """Replace keys of config.json; the value "absent" removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Give the layers large outputs: otherwise a model with tied embeddings always repeats its last token."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.add_(torch.randn_like(weight) * 0.1)
        elif weight.dim() == 1:
            weight.copy_(torch.randn_like(weight) * 0.2)
        elif "embed" in name or "lm_head" in name:
            weight.copy_(torch.randn_like(weight) * 0.4)
        else:
            gain = 4 if "o_proj" in name or "down_proj" in name else 1
            weight.copy_(torch.randn_like(weight) * gain * weight.shape[-1] ** -0.5)
