"""Safetensors checkpoints: locate tensors, check that files are complete, and write new checkpoints.

`safetensors_file` has the format of a file, `quantised` that of quantised matrices.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from daemon.models.architecture import ModelConfig
from daemon.models.families import Place
from daemon.models.files import ModelError, read_json
from daemon.models.quantised import Matrix, find_matrices, read_scheme
from daemon.models.safetensors_file import Tensor, check_size, read_array, read_header
from daemon.models.tensors import expected_tensors, find_tensors

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SHARD_BYTES = 4 * 10**9
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_map(path: Path) -> dict[str, Path]:
    """Return the file of each tensor, by tensor name.

    Raises ModelError if there are no safetensors weights or a file is missing.
    """
    index = read_json(path / _INDEX)
    if index is None:
        single = path / _SINGLE
        if not single.is_file():
            raise ModelError(_no_weights(path))
        return dict.fromkeys(read_header(single), single)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise ModelError(f"{path / _INDEX} has no weight_map")
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise ModelError(f"{path / _INDEX} points to a file outside the directory: {file}")
        if not (path / file).is_file():
            raise ModelError(f"{path} lacks the shard {file} that its index lists; download it again")
    return {name: path / file for name, file in names.items()}


class Source(NamedTuple):
    """Where a canonical tensor comes from: rows of the stored tensor `tensor`, or of the quantised `matrix`."""

    place: Place
    tensor: Tensor | None
    matrix: Matrix | None


def check(config: ModelConfig) -> dict[str, Source]:
    """Check that the directory has exactly the weights that `config` describes. Raises ModelError.

    Return the source of each canonical tensor.
    """
    files = weight_map(config.path)
    headers = {file: read_header(file) for file in set(files.values())}
    stored = {name: headers[file][name] for name, file in files.items() if name in headers[file]}
    scheme = read_scheme(config)
    matrices, tensors = find_matrices(scheme, stored) if scheme else ({}, stored)
    unused = _zero_biases(config, matrices, tensors)
    names = matrices.keys() | (tensors.keys() - unused)
    found = {
        name: Source(place, tensors.get(place.name), matrices.get(place.name))
        for name, place in find_tensors(config, names).items()
    }
    for source in {source.place: source for source in found.values()}.values():
        _check_source(config.path, source)
    return found


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    load: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint of `dtype` ("F32" or "BF16") and sync it to disk. Only one tensor is in memory at a time.

    `load(name)` returns a float32 array of the shape `shapes[name]`. A checkpoint above `shard_bytes` is written as
    shards and an index.
    """
    sizes = {n: math.prod(s) * ITEM_BYTES[dtype] for n, s in shapes.items()}
    shards = _split(sizes, shard_bytes)
    files: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path / file, names, shapes, sizes, dtype, load)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (path / _INDEX).write_text(json.dumps(index, indent=1))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16 (nearest even). Return its bits as uint16 of the same shape. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _no_weights(path: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(path.glob(pattern)):
            return (
                f"{path} has only {pattern} weights. These are pickles, which can run code when they are loaded, "
                "so llumd refuses them; convert them to safetensors"
            )
    if found := sorted(path.glob("*.gguf")):
        return f"{path} has no safetensors weights; to serve its GGUF file, give the path of the file: {found[0]}"
    return f"{path} has neither {_SINGLE} nor {_INDEX}"


def _zero_biases(config: ModelConfig, matrices: Mapping[str, Matrix], tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the biases of quantised matrices that the model does not have and that are zero.

    Some tools (early AutoGPTQ) write one for each matrix.
    """
    names = {name.removesuffix("weight") + "bias" for name in matrices}.intersection(tensors)
    return {name for name in names.difference(expected_tensors(config)) if not read_array(tensors[name]).any()}


def _check_source(path: Path, source: Source) -> None:
    place, tensor, matrix = source
    if matrix is not None:
        _check_shape(f"{path}: {place.name}", matrix.shape, place.shape)
    elif tensor is not None:
        what = f"{tensor.file}: {place.name}"
        if tensor.dtype not in ITEM_BYTES:
            raise ModelError(f"{what} is stored as {tensor.dtype}; supported are F32, F16 and BF16")
        _check_shape(what, tensor.shape, place.shape)
        check_size(what, tensor)


def _check_shape(what: str, shape: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if shape != needed:
        raise ModelError(f"{what} has shape {list(shape)}; config.json needs {list(needed)}")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_file(
    file: Path,
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    dtype: str,
    load: Callable[[str], np.ndarray],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # readers map the data into memory, so it must be aligned
    with file.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            values = load(name)
            if values.shape != shapes[name]:
                raise ModelError(f"{name} has shape {list(values.shape)}, not {list(shapes[name])}")
            for part in np.array_split(
                values.reshape(-1), max(1, values.size >> 24)
            ):  # small parts, so that temporary arrays are small
                f.write((to_bfloat16(part) if dtype == "BF16" else part).data)
        f.flush()
        os.fsync(f.fileno())
