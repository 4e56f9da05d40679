"""Opening a model: parse its configuration and check that its weights fit it."""

from __future__ import annotations

from pathlib import Path

from daemon.models.model_config import ModelConfig, ModelError, check_tokenizer, read_model_config


def open_model(path: Path, name: str = "", load_format: str = "auto") -> ModelConfig:
    """Parse the configuration of a Hugging Face directory, and check its weights and its tokenizer file.

    Only the headers of the weight files are read. With the `load_format` "dummy" only config.json is needed and no
    weights are checked. `name` defaults to the name of the directory. Raises ModelError for every model that llumd
    cannot compute exactly as Transformers does, and for weights that are incomplete or damaged.
    """
    model_config = read_model_config(path, name)
    if load_format != "dummy":
        from daemon.models import checkpoint  # imports numpy

        checkpoint.check(model_config)
        check_tokenizer(path)
    return model_config


def stored_bytes(path: Path) -> int:
    """Return the bytes of the weight files that a directory's index names; 0 if they are not there."""
    from daemon.models import checkpoint

    try:
        return sum(file.stat().st_size for file in set(checkpoint.weight_map(path).values()))
    except ModelError:
        return 0
