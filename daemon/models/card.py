"""The model card: all that the daemon needs to know of a model before it loads a weight. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model that cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A Llama-family decoder, as its Hugging Face directory describes it."""

    path: Path
    name: str  # what clients call it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or {"rope_type": "llama3" | "linear", ...}
    max_position: int  # longest sequence, tokens
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @property
    def num_params(self) -> int:
        """Weights in the model (a tied embedding once)."""
        qkv = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        out = self.num_heads * self.head_dim * self.hidden_size
        layer = qkv + out + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        head = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + head + self.hidden_size
