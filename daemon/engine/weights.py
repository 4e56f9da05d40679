"""Sources of a model's tensors: a safetensors directory, or random numbers.

Tensors of a checkpoint are views of the mapped files. Engines that map the same file share its pages. The weights
packed for the linear layers are a private copy in each process, so only the embedding table stays shared. Quantised
matrices are dequantised to float32 when they are read, unless an engine computes with FP8.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from daemon.models import checkpoint
from daemon.models.model_config import ModelConfig, ModelError
from daemon.models.quantised import Matrix
from daemon.models.tensors import expected_tensors


class Fp8Matrix(NamedTuple):
    """An e4m3 matrix [out, in] as it is stored, and the factor of each row, float32[out]."""

    values: torch.Tensor
    scales: torch.Tensor


class Weights(Protocol):
    """Tensors by their canonical names, see `daemon.models.tensors`."""

    def get(self, name: str) -> torch.Tensor:
        """Return the tensor in its stored dtype. Do not write to it: it may be mapped.

        Raises KeyError if the model has no such tensor.
        """
        ...

    def fp8(self, name: str) -> Fp8Matrix | None:
        """Return a matrix without dequantising it; None unless it is FP8 with a factor for each row or for all."""
        ...


class CheckpointWeights:
    """The safetensors files of a model's directory, checked for completeness before a tensor is read.

    Raises ModelError if a tensor is missing or has the wrong shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._files: dict[Path, Any] = {}
        self._sources = checkpoint.check(config)
        self._dequantised = "", torch.empty(0)  # the last matrix: several tensors may be rows of it

    def get(self, name: str) -> torch.Tensor:
        place, stored, matrix = self._sources[name]
        if matrix is not None:
            tensor = self._dequantise(place.name, matrix)
        else:
            assert stored is not None
            tensor = self._mapped(stored.file, place.name)
        rows = tensor if place.part is None else tensor[place.part]
        return rows[place.begin : place.end]

    def fp8(self, name: str) -> Fp8Matrix | None:
        place, _, matrix = self._sources[name]
        if matrix is None or not matrix.row_scales or place.part is not None:
            return None
        values = self._mapped(matrix.parts["weight"].file, place.name)
        scale_name = place.name.removesuffix("weight") + matrix.row_scales
        scales = self._mapped(matrix.parts[matrix.row_scales].file, scale_name).float().flatten().expand(len(values))
        rows = slice(place.begin, place.end)
        return Fp8Matrix(values[rows], scales[rows])

    def _mapped(self, file: Path, name: str) -> torch.Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt", device="cpu")
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ModelError(f"cannot read {name} from {file}: {e}") from None
        return tensor

    def _dequantise(self, name: str, matrix: Matrix) -> torch.Tensor:
        if self._dequantised[0] != name:
            self._dequantised = "", torch.empty(0)  # first free the one before
            self._dequantised = name, torch.from_numpy(matrix.read())
        return self._dequantised[1]


class DummyWeights:
    """Random weights that depend only on the tensor's name and shape: the same on every engine."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = expected_tensors(config)
        self._norm = 1.0 - config.norm_offset

    def get(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.full(shape, self._norm)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)

    def fp8(self, name: str) -> None:
        return None


def open_weights(config: ModelConfig, load_format: str) -> Weights:
    """Return the weights for `load_format`: "auto" or "dummy"."""
    return DummyWeights(config) if load_format == "dummy" else CheckpointWeights(config)
