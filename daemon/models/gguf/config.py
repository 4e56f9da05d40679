"""The config.json of the model in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from daemon.models.gguf.file import GGUF
from daemon.models.model_config import ModelError

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # number of layers


def config_of(source: GGUF) -> dict[str, Any]:
    """Return the content of config.json. Raises ModelError for what the metadata lacks or llumd cannot compute."""
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path} lacks token_embd.weight")
    heads = source.count("attention.head_count")
    eos = [source.metadata.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
    eos_ids = [token for i, token in enumerate(eos) if token is not None and token not in eos[:i]]
    config = {
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": source.count("embedding_length"),
        "intermediate_size": source.count("feed_forward_length"),
        "num_hidden_layers": source.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": source.count("attention.head_count_kv", heads),
        "head_dim": source.head_dim,
        "max_position_embeddings": source.count("context_length"),
        "rms_norm_eps": source.decimal("attention.layer_norm_rms_epsilon"),
        "rope_theta": source.decimal("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(source),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "bos_token_id": source.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[source.dtype],
    }
    rotated = source.number("rope.dimension_count", source.head_dim) or source.head_dim
    if rotated != source.head_dim and source.architecture != "phi3":
        raise ModelError(f"{source.path}: partly rotated heads are supported only for phi3")
    return config | _FAMILY[source.architecture](source)


def _llama(source: GGUF) -> dict[str, Any]:
    """Return what is special in Llama, Mistral or Mixtral: the same architecture for llama.cpp."""
    window = _window(source)
    if source.get("expert_count", 0):
        experts = {
            "num_local_experts": source.count("expert_count"),
            "num_experts_per_tok": source.count("expert_used_count"),
        }
        return _named("Mixtral") | experts | {"sliding_window": window}
    if window:
        return _named("Mistral") | {"sliding_window": window}
    return _named("Llama") | {"mlp_bias": "blk.0.ffn_up.bias" in source.tensors}


def _qwen3_moe(source: GGUF) -> dict[str, Any]:
    dense = [i for i in range(source.num_layers) if f"blk.{i}.ffn_gate_inp.weight" not in source.tensors]
    return _named("Qwen3Moe", "qwen3_moe") | {
        "num_experts": source.count("expert_count"),
        "num_experts_per_tok": source.count("expert_used_count"),
        "moe_intermediate_size": source.count("expert_feed_forward_length"),
        "norm_topk_prob": source.get("expert_weights_norm", True) is not False,  # llama.cpp always does
        "mlp_only_layers": dense,
    }


def _gemma(source: GGUF) -> dict[str, Any]:
    # The metadata has no scale of queries. As llama.cpp does, know the models in which it is not that of the heads.
    scalar: float = source.head_dim
    if source.get("attention.scale"):
        scalar = round(source.decimal("attention.scale") ** -2, 4)
    elif source.num_layers == _GEMMA_27B[source.architecture]:
        scalar = source.count("embedding_length") // source.count("attention.head_count")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": _optional(source, "final_logit_softcapping"),
    }


def _gemma2(source: GGUF) -> dict[str, Any]:
    caps = {key: _optional(source, key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of llama.cpp
    window = {"sliding_window": source.count("attention.sliding_window", 4096)}
    return _named("Gemma2") | _gemma(source) | {k: v or defaults[k] for k, v in caps.items()} | window


def _gemma3(source: GGUF) -> dict[str, Any]:
    window = _window(source)
    pattern = source.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        slides = [bool(x) for x in pattern]
    else:
        every = source.count("attention.sliding_window_pattern", 6)
        slides = [(i + 1) % every != 0 for i in range(source.num_layers)]
    types = ["sliding_attention" if slide and window else "full_attention" for slide in slides]
    local = {"rope_local_base_freq": source.decimal("rope.freq_base_swa", 10000.0)}
    return _named("Gemma3", "gemma3_text") | _gemma(source) | {"sliding_window": window, "layer_types": types} | local


def _phi3(source: GGUF) -> dict[str, Any]:
    share = source.count("rope.dimension_count", source.head_dim) / source.head_dim
    length = source.count("rope.scaling.original_context_length", source.count("context_length"))
    return _named("Phi3") | {
        "sliding_window": _window(source),
        "partial_rotary_factor": share,
        "original_max_position_embeddings": length,
    }


def _granite(source: GGUF) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    factors = {ours: source.decimal(theirs) for ours, theirs in keys.items() if source.get(theirs) is not None}
    return _named("Granite") | factors | {"mlp_bias": "blk.0.ffn_up.bias" in source.tensors}


def _olmo2(source: GGUF) -> dict[str, Any]:
    if _window(source):
        raise ModelError(f"{source.path} is OLMo 3 (attention.sliding_window), which is not supported")
    return _named("Olmo2")


_FAMILY: dict[str, Callable[[GGUF], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": lambda source: _named("Qwen2"),
    "qwen3": lambda source: _named("Qwen3"),
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
}


def _named(name: str, model_type: str = "") -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type or name.lower()}


def _window(source: GGUF) -> int | None:
    """Return the sliding window in tokens; None for none, which files also write as 0."""
    return source.count("attention.sliding_window") if source.get("attention.sliding_window") else None


def _optional(source: GGUF, key: str) -> float | None:
    return source.decimal(key) if source.get(key) else None


def _rope_scaling(source: GGUF) -> dict[str, Any] | None:
    kind = source.get("rope.scaling.type", "none")
    if LONG_FACTORS in source.tensors:
        return _longrope(source)
    if ROPE_FACTORS in source.tensors:
        return _llama3_scaling(source)
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": source.number("rope.scaling.factor", 1.0)}
        case "yarn":
            return _yarn(source)
    raise ModelError(
        f"{source.path}: rope scaling {kind!r} is not supported; supported are llama3, linear, yarn, longrope, none"
    )


def _yarn(source: GGUF) -> dict[str, Any]:
    if source.get("rope.scaling.attn_factor", 1.0) != 1.0 or source.get("rope.scaling.yarn_log_multiplier"):
        raise ModelError(f"{source.path}: yarn with an own rope.scaling.attn_factor is not supported")
    return {
        "rope_type": "yarn",
        "factor": source.decimal("rope.scaling.factor"),
        "original_max_position_embeddings": source.count("rope.scaling.original_context_length"),
        "beta_fast": source.decimal("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": source.decimal("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(source: GGUF) -> dict[str, Any]:
    """Return the rope scaling of Phi-3: one list of divisors up to the original length, and one beyond it."""
    if SHORT_FACTORS not in source.tensors:
        raise ModelError(f"{source.path} lacks {SHORT_FACTORS}")
    factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    scaling = {key: [float(str(x)) for x in _float32(source, name)] for key, name in factors.items()}
    attention = {}
    if source.get("rope.scaling.attn_factor") is not None:
        attention = {"attention_factor": source.decimal("rope.scaling.attn_factor")}
    return {"rope_type": "longrope"} | scaling | attention


def _float32(source: GGUF, name: str) -> np.ndarray:
    tensor = source.tensors[name]
    if tensor.tensor_type.name != "F32":
        raise ModelError(f"{source.path}: {name} is {tensor.tensor_type.name}, not F32")
    return np.asarray(tensor.data, dtype=np.float32).reshape(-1)


def _llama3_scaling(source: GGUF) -> dict[str, Any]:
    """Return the rope scaling of Llama 3.1 and later. GGUF stores its result: the divisor of each frequency."""
    head_dim = source.head_dim
    divisors = _float32(source, ROPE_FACTORS).astype(np.float64)
    theta = source.number("rope.freq_base", 10000.0)
    factor = round(float(divisors.max()), 4)
    low, high, original = 1.0, 4.0, 8192  # the same in every published model
    rotations = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    if divisors.shape != rotations.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise ModelError(
            f"{source.path}: its rope frequency factors are not from llama3 scaling, which is the only kind supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
