"""What the CUDA engine does not compute. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelConfig


def unsupported(config: ModelConfig) -> str | None:
    """Return what the model has that this engine does not compute, in words for an error; None: nothing."""
    experts = config.experts
    found = {
        "norms with another offset than 0 or 1": config.norm_offset not in (0.0, 1.0),
        "experts with biases": bool(experts and config.mlp_bias),
        f"experts with the activation {config.activation}": bool(experts and config.activation != "silu"),
    }
    return next((what for what, has in found.items() if has), None)
