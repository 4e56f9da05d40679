"""Lower bounds for the time of a Llama step on a device: what it must read and compute. Pure.

A decode step reads every matrix and all KV of its batch once. Products and attention run one after the other, and
each is bound by memory or by arithmetic: ``max(W / bandwidth, 2 B P / rate) + max(B ctx kv / bandwidth,
4 B L H D ctx / rate)`` with W bytes of weights, B sequences of ctx tokens, kv bytes a token, P parameters in
matrices, L layers, H heads of width D.
"""

from __future__ import annotations

from daemon.models.model_config import ModelConfig

BF16 = 2  # bytes


def layer_params(config: ModelConfig) -> int:
    """Return the parameters in the matrices of all layers."""
    qkv = config.hidden_size * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    out = config.num_heads * config.head_dim * config.hidden_size
    return config.num_layers * (qkv + out + 3 * config.hidden_size * config.intermediate_size)


def head_params(config: ModelConfig) -> int:
    """Return the parameters of the output layer. (The embedding is looked up, not multiplied.)"""
    return config.vocab_size * config.hidden_size


def kv_bytes(config: ModelConfig, item_bytes: int = BF16) -> int:
    """Return the bytes of KV of one token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes


def decode_seconds(
    config: ModelConfig, batch: int, context: int, *, bandwidth: float, rate: float, kv_item_bytes: int = BF16
) -> float:
    """Return the least seconds of a decode step over sequences of `context` tokens.

    `bandwidth`: in bytes/s. `rate`: in FLOP/s.
    """
    params = layer_params(config) + head_params(config)
    products = max(params * BF16 / bandwidth, 2 * batch * params / rate)
    kv = batch * context * kv_bytes(config, kv_item_bytes)
    attention = 4 * batch * config.num_layers * config.num_heads * config.head_dim * context
    return products + max(kv / bandwidth, attention / rate)


def prefill_flop(config: ModelConfig, tokens: int) -> float:
    """Return the operations for a prompt of `tokens` in one chunk: matrices, causal attention, one row of logits."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * (tokens + 1)
    return 2.0 * layer_params(config) * tokens + attention + 2.0 * head_params(config)
