"""GGUF files of tiny models of all families, written as llama.cpp does: with its names and its changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

Arrays = dict[str, np.ndarray]

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
ARCHITECTURE = {"Mistral": "llama", "Mixtral": "llama", "Qwen3Moe": "qwen3moe", "Gemma3Text": "gemma3"}


def gguf_name(name: str, special: dict[str, str] | None = None) -> str:
    """Return the GGUF name of a Hugging Face tensor. `special`: names of the architecture."""
    names = _NAMES | (special or {})
    stem, _, kind = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{names[inner]}.{kind}"


def write_family(directory: Path, file: Path, kind: str, *, experts_stacked: bool = True) -> None:
    """Write the model in `directory`, of the Transformers class `kind`, to a GGUF file in float32."""
    from gguf import GGUFWriter

    from tests.models.gguf.tiny_gguf import tokenizer_metadata, value_types

    architecture = ARCHITECTURE.get(kind, kind.lower())
    config = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(file, architecture)
    for key, value in _metadata(architecture, config).items():
        if value is not None:
            writer.add_key_value(f"{architecture}.{key}", value, *value_types(value))
    for key, value in tokenizer_metadata(directory).items():
        writer.add_key_value(key, value, *value_types(value))
    for name, values in _tensors(directory, architecture, config, experts_stacked=experts_stacked).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(directory: Path, architecture: str, config: dict[str, Any], *, experts_stacked: bool) -> Arrays:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    special = _FOUR_NORMS if "gemma" in architecture or architecture == "olmo2" else {}
    out: Arrays = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        values = tensor.float().numpy()
        if match := _EXPERT.fullmatch(name):
            layer, expert, part = match.groups()
            if experts_stacked:
                experts.setdefault(f"blk.{layer}.ffn_{_PARTS[part]}_exps.weight", {})[int(expert)] = values
            else:
                out[f"blk.{layer}.ffn_{_PARTS[part]}.{expert}.weight"] = values
            continue
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if "gemma" in architecture and name.endswith("norm.weight"):
            values = values + 1
        if architecture in ("llama", "granite") and (count := heads.get(name.split(".")[-2])):
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        out[gguf_name(name, special)] = np.ascontiguousarray(values)
    out |= {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
    rope = config.get("rope_parameters") or {}
    for length in ("long", "short"):
        if factors := rope.get(f"{length}_factor"):
            out[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    return out


def _metadata(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the architecture; None for what it lacks."""
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    scaled = rope["rope_type"] if rope["rope_type"] in ("linear", "yarn") else None
    window = config.get("sliding_window") or (0 if architecture == "phi3" else None)
    # llama.cpp writes no window of Qwen's, whose published models do not use it.
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": None if architecture in ("phi3", "granite") else head_dim,
        "attention.value_length": None if architecture in ("phi3", "granite") else head_dim,
        "attention.sliding_window": None if "qwen" in architecture else window,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": None if "gemma" in architecture else int(head_dim * share),
        "rope.scaling.type": scaled,
        "rope.scaling.factor": rope.get("factor") if scaled else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
        or (config["max_position_embeddings"] if architecture == "phi3" else None),
        "expert_count": config.get("num_local_experts") or config.get("num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "attention.sliding_window_pattern": _pattern(architecture, config),
        "attention.scale": config.get("attention_multiplier"),
        "embedding_scale": config.get("embedding_multiplier"),
        "residual_scale": config.get("residual_multiplier"),
        "logit_scale": config.get("logits_scaling"),
    }


def _pattern(architecture: str, config: dict[str, Any]) -> list[bool] | None:
    return [t == "sliding_attention" for t in config["layer_types"]] if architecture == "gemma3" else None
