"""Small GGUF files for tests, with the random weights of the tiny model directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.gguf.family_gguf import gguf_name
from tests.models.tiny_model import CHAT_TEMPLATE, make_tiny_llama, random_weights


def to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from (first, second) halves to (even, odd) pairs, as llama.cpp does."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def make_tiny_gguf(
    file: Path,
    kind: str = "Q8_0",
    *,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    **shape: Any,
) -> dict[str, np.ndarray]:
    """Write `file` with matrices quantised as `kind`. Return the expected float32 weights by Hugging Face name."""
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    source = make_tiny_llama(file.parent / "source", weights=False, **shape)
    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = GGUFWriter(file, "llama")
    for key, value in (_metadata(source, config) | (metadata or {})).items():
        if value is not None:
            writer.add_key_value(key, value, *value_types(value))
    expected = {}
    for name, weight in random_weights(config, seed=5).items():
        count = heads.get(name.split(".")[-2])
        values = weight if count is None else to_pairs(weight, count)
        target = GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        data = quantize(values, target)
        writer.add_tensor(gguf_name(name), data, raw_dtype=target)
        back = dequantize(data, target).reshape(weight.shape)
        # Invert to_pairs() independently of the converter: from the position of each row.
        order = np.arange(len(weight)) if count is None else to_pairs(np.arange(len(weight)), count)
        expected[name] = back[np.argsort(order)]
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _metadata(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
    } | tokenizer_metadata(source)


def tokenizer_metadata(source: Path) -> dict[str, Any]:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def value_types(value: Any) -> tuple[Any, ...]:
    from gguf import GGUFValueType as Type

    plain = {bool: Type.BOOL, str: Type.STRING, int: Type.UINT32, float: Type.FLOAT32}
    if isinstance(value, list):
        return Type.ARRAY, Type.INT32 if type(value[0]) is int else plain[type(value[0])]
    return (plain[type(value)],)
