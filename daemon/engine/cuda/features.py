"""What the CUDA engine does not compute. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelConfig


def unsupported(config: ModelConfig) -> str | None:
    """Return what the model has that this engine does not compute, in words for an error; None: nothing."""
    found = {
        "sliding windows": any(layer.window for layer in config.layers),
        "a mixture of experts": config.experts is not None,
        "several rotary embeddings": len(config.ropes) > 1,
        "partly rotated heads": any(rope.rotary_dim != config.head_dim for rope in config.ropes),
        f"the activation {config.activation}": config.activation != "silu",
        "norms after attention and MLP": config.norm_kind != "pre",
        "norms of queries and keys": bool(config.qk_norm),
        "its scale of attention scores": config.query_scale != config.head_dim**-0.5,
        "capped scores": bool(config.attention_softcap or config.logits_softcap),
        "scaled embeddings, residuals or logits": (
            (config.embedding_scale, config.residual_scale, config.logits_divisor) != (1.0, 1.0, 1.0)
        ),
    }
    return next((what for what, has in found.items() if has), None)
