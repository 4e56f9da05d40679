"""Estimate of a CPU engine's memory besides its KV pool, before anything is allocated. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelConfig

ITEM_BYTES = {"bf16": 2, "fp32": 4}
_LOGITS_BYTES = 4  # float32
_HEAD_BYTES = 4  # the output layer is float32 in every arithmetic


def weights_bytes(config: ModelConfig, arithmetic: str) -> int:
    """Return the private bytes of one engine's packed weights.

    The embedding table is not included: it is a mapped file, shared by all engines.
    """
    layers = config.num_params - config.hidden_size - _embedding(config) * (1 if config.tie_embeddings else 2)
    return (layers + config.hidden_size) * ITEM_BYTES[arithmetic] + _embedding(config) * _HEAD_BYTES


def embedding_bytes(config: ModelConfig, item_bytes: int = 2) -> int:
    """Return the bytes of the embedding table as stored in the checkpoint.

    All engines of the machine share it, but with dummy weights each engine has a private copy.
    """
    return _embedding(config) * item_bytes


def activation_bytes(
    config: ModelConfig, arithmetic: str, *, max_batch_tokens: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Return the bytes of a full step's activations and logits, and of the rotary tables."""
    attention = config.num_heads * config.head_dim
    qkv = attention + 2 * config.num_kv_heads * config.head_dim
    item = ITEM_BYTES[arithmetic]
    each = 4 * (config.hidden_size + attention)  # residual and rotated queries, in float32
    each += item * (2 * config.hidden_size + attention + qkv + 3 * config.mlp_width)
    if config.experts:
        each += item * 2 * config.experts.per_token * config.hidden_size  # rows grouped by expert
    logits = max_num_seqs * (config.vocab_size * (_LOGITS_BYTES + item) + item * config.hidden_size)
    return max_batch_tokens * each + logits + max_model_len * sum(rope.rotary_dim for rope in config.ropes) * 4


def _embedding(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size
