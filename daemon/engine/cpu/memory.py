"""How much memory a CPU engine needs beside its KV pool, before anything is allocated. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelCard

ITEM_BYTES = {"bf16": 2, "fp32": 4}
_LOGITS_BYTES = 4  # float32
_HEAD_BYTES = 4  # the output layer is float32 in every arithmetic


def weights_bytes(card: ModelCard, arithmetic: str) -> int:
    """Private bytes of one engine's packed weights. The embedding table is a mapped file, shared by all engines."""
    layers = card.num_params - card.hidden_size - _embedding(card) * (1 if card.tie_embeddings else 2)
    return (layers + card.hidden_size) * ITEM_BYTES[arithmetic] + _embedding(card) * _HEAD_BYTES


def embedding_bytes(card: ModelCard, item_bytes: int = 2) -> int:
    """Bytes of the embedding table as stored in the checkpoint, once for the box; private with dummy weights."""
    return _embedding(card) * item_bytes


def activation_bytes(
    card: ModelCard, arithmetic: str, *, max_batch_tokens: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Bytes of a full step's activations, its logits and the rotary tables."""
    attention = card.num_heads * card.head_dim
    qkv = attention + 2 * card.num_kv_heads * card.head_dim
    item = ITEM_BYTES[arithmetic]
    each = 4 * (card.hidden_size + attention)  # residual and rotated queries, in float32
    each += item * (2 * card.hidden_size + attention + qkv + 3 * card.intermediate_size)
    logits = max_num_seqs * (card.vocab_size * (_LOGITS_BYTES + item) + item * card.hidden_size)
    return max_batch_tokens * each + logits + max_model_len * card.head_dim * 4


def _embedding(card: ModelCard) -> int:
    return card.vocab_size * card.hidden_size
