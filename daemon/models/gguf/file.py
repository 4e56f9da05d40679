"""An open GGUF file, and the architectures of which it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daemon.models import checkpoint
from daemon.models.model_config import ModelError
from daemon.units import quoted

# llama.cpp has Llama, Mistral and Mixtral as "llama". It stores the rows of queries and keys of the architectures in
# PAIRED in another order, see `convert`.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "granite", "olmo2")
PAIRED = ("llama", "granite")


@dataclass(frozen=True, slots=True)
class GGUF:
    """An open GGUF file: metadata as plain values, tensors still quantised (mapped into memory, not read)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]  # gguf.ReaderTensor by name

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value of the section of the architecture, such as `context_length`."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)

    def number(self, key: str, default: float | None = None) -> int | float:
        """Return a metadata value of that section that is a finite number. Raises ModelError for any other value."""
        value = self.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no value for {key}")
        if isinstance(value, list):
            raise ModelError(f"{self.path}: {key} differs from layer to layer, which is not supported")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ModelError(f"{self.path}: {key} is {quoted(value)}, which is not a number; download the file again")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """Return a number, as `number` does, with the value that the author of the model wrote.

        Metadata has float32 values; that value is their shortest decimal.
        """
        return float(str(np.float32(self.number(key, default))))

    def count(self, key: str, default: int | None = None) -> int:
        """Return a metadata value of that section that is a whole number above 0. Raises ModelError."""
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{self.path}: {key} is {value}, which is not a whole number above 0")
        return value

    @property
    def architecture(self) -> str:
        """The architecture, as GGUF names it."""
        return str(self.metadata.get("general.architecture"))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.count("block_count")

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.count(
            "attention.key_length", self.count("embedding_length") // self.count("attention.head_count")
        )

    @property
    def dtype(self) -> str:
        """Type of the converted weights, as safetensors names it."""
        routers = "ffn_gate_inp.weight"  # they are always float32
        float32 = any(
            t.tensor_type.name == "F32" and len(t.shape) == 2 and not name.endswith(routers)
            for name, t in self.tensors.items()
        )
        return "F32" if float32 else "BF16"

    @property
    def converted_bytes(self) -> int:
        """Size of the converted weights in bytes."""
        return sum(math.prod(map(int, t.shape)) for t in self.tensors.values()) * checkpoint.ITEM_BYTES[self.dtype]


def open_gguf(file: Path) -> GGUF:
    """Read metadata and tensor table. Raises ModelError if the file is damaged or of an unknown architecture."""
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise ModelError(
            f"converting {file.name} needs the Python package {e.name}: pip install 'llumd[convert]'"
        ) from None
    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as e:  # the reader fails in many ways on a truncated file
        raise ModelError(f"{file} is not a complete GGUF file: {e}") from None
    opened = GGUF(file, metadata, tensors)
    check(opened)
    return opened


def check(source: GGUF) -> None:
    """Raise ModelError unless the file is whole and its architecture, with the shape of its heads, is known."""
    if source.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{source.path}: architecture {source.architecture!r} is not supported; supported are {known}"
        )
    if source.metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(f"{source.path} is one of several parts; merge them with llama-gguf-split --merge")
    if {source.number("attention.value_length", source.head_dim) or source.head_dim} != {source.head_dim}:
        raise ModelError(f"{source.path}: unequal head sizes are not supported")
