"""Conversion of a GGUF file: dequantised weights, config.json and the tokenizer, all from the file.

The `gguf` package reads the file, one tensor in memory at a time. Weights become bfloat16, except if the file has
float32 matrices. The rounding (2^-9 relative) is far below that of every quantisation in GGUF, the published weights
of such models are bfloat16 themselves, and the directory, its load time and its page cache are half as large.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from daemon.models import checkpoint
from daemon.models.families import Place
from daemon.models.gguf.config import config_of
from daemon.models.gguf.file import GGUF, PAIRED
from daemon.models.gguf.names import find_places
from daemon.models.gguf.tokenizer import write_tokenizer
from daemon.models.loader import open_model
from daemon.models.model_config import ModelConfig, ModelError, read_model_config
from daemon.models.tensors import expected_tensors

Floats = npt.NDArray[np.float32]


def convert(source: GGUF, directory: Path) -> None:
    """Write config.json, the weights, tokenizer.json and the chat template to `directory`, and check them.

    Raises ModelError; then the caller must delete the directory.
    """
    (directory / "config.json").write_text(json.dumps(config_of(source), indent=2))
    write_tokenizer(source.metadata, directory)
    model_config = read_model_config(directory)
    checkpoint.write(directory, expected_tensors(model_config), source.dtype, _Loader(source, model_config))
    open_model(directory)


class _Loader:
    """Function from the canonical name of a tensor to its float32 values, as Hugging Face checkpoints have them."""

    def __init__(self, source: GGUF, model_config: ModelConfig) -> None:
        self._source = source
        self._places = find_places(source, model_config)
        paired = source.architecture in PAIRED
        heads = {"q_proj": model_config.num_heads, "k_proj": model_config.num_kv_heads}
        self._heads = heads if paired else {}
        self._norm_offset = np.float32(model_config.norm_offset)  # it is part of the norms in GGUF

    def __call__(self, name: str) -> Floats:
        values = self._read(self._places[name])
        if name.endswith("norm.weight"):
            return values - self._norm_offset
        heads = self._heads.get(name.split(".")[-2])
        return values if heads is None else _to_halves(values, heads)

    def _read(self, place: Place) -> Floats:
        from gguf import dequantize

        tensor = self._source.tensors[place.name]
        # The data has the shape of the tensor, but for the last axis, which has bytes: a part or rows can be cut out.
        data = tensor.data if place.part is None else tensor.data[place.part]
        try:
            values = dequantize(data[place.begin : place.end], tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self._source.path}: the type {tensor.tensor_type.name} of {place.name} is not supported"
            ) from None
        return np.asarray(values, dtype=np.float32)


def _to_halves(values: Floats, heads: int) -> Floats:
    """Reorder the rows of each head from (even, odd) pairs, the layout of llama.cpp, to (first, second) halves.

    `values` and the result have the shape [heads * head_dim, ...].
    """
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)
