"""Where a model's tensors come from: a safetensors directory, or a seed.

Checkpoint tensors are views of the mapped files. Engines that map the same file share its pages; what is
packed for the linear layers is a private copy in each process, so only the embedding table stays shared.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from daemon.models import checkpoint
from daemon.models.model_config import ModelConfig, ModelError


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor, in its stored dtype. KeyError unless the model has it. It may be mapped: do not write."""
        ...


class Checkpoint:
    """The safetensors files of a card's directory; checked to be whole before a tensor is read.

    Raises ModelError where a tensor is missing or misshapen.
    """

    def __init__(self, config: ModelConfig) -> None:
        checkpoint.check(config)
        self._files: dict[Path, Any] = {}
        self._where = checkpoint.weight_map(config.path)

    def get(self, name: str) -> torch.Tensor:
        file = self._where[name]
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt", device="cpu")
            return self._files[file].get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ModelError(f"cannot read {name} from {file}: {e}") from None


class Dummy:
    """Random weights that depend on the card and the tensor's name alone: the same on every engine."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = checkpoint.expected_tensors(config)

    def get(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)


def open_weights(config: ModelConfig, load_format: str) -> Weights:
    """The weights for `load_format`: "auto" or "dummy"."""
    return Dummy(config) if load_format == "dummy" else Checkpoint(config)
