"""The least that a step of a Llama can take on a device, by what it must read and compute. Pure.

A decode step reads every matrix and all KV of its batch once: ``max((W + B ctx kv) / bandwidth,
B (2 P + 4 L H D ctx) / rate)`` with W bytes of weights, B sequences of ctx tokens, kv bytes a token, P parameters in
matrices, L layers, H heads of width D.
"""

from __future__ import annotations

from daemon.models.model_config import ModelCard

BF16 = 2  # bytes


def layer_params(card: ModelCard) -> int:
    """Parameters in the matrices of all layers."""
    qkv = card.hidden_size * (card.num_heads + 2 * card.num_kv_heads) * card.head_dim
    out = card.num_heads * card.head_dim * card.hidden_size
    return card.num_layers * (qkv + out + 3 * card.hidden_size * card.intermediate_size)


def head_params(card: ModelCard) -> int:
    """Parameters of the output layer. (The embedding is looked up, not multiplied.)"""
    return card.vocab_size * card.hidden_size


def kv_bytes(card: ModelCard, item_bytes: int = BF16) -> int:
    """KV of one token."""
    return 2 * card.num_layers * card.num_kv_heads * card.head_dim * item_bytes


def decode_seconds(
    card: ModelCard, batch: int, context: int, *, bandwidth: float, rate: float, kv_item_bytes: int = BF16
) -> float:
    """Least time of a decode step over sequences of `context` tokens; `bandwidth` in bytes/s, `rate` in FLOP/s."""
    params = layer_params(card) + head_params(card)
    read = params * BF16 + batch * context * kv_bytes(card, kv_item_bytes)
    attention = 4 * card.num_layers * card.num_heads * card.head_dim * context
    return max(read / bandwidth, batch * (2 * params + attention) / rate)


def prefill_flop(card: ModelCard, tokens: int) -> float:
    """Operations for a prompt of `tokens` in one piece: the matrices, causal attention, one row of logits."""
    attention = 2 * card.num_layers * card.num_heads * card.head_dim * tokens * (tokens + 1)
    return 2.0 * layer_params(card) * tokens + attention + 2.0 * head_params(card)
