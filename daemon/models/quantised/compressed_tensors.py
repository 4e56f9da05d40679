"""compressed-tensors, which llm-compressor writes: whole numbers or float8, plain or packed into words.

Packed matrices are `weight_packed` int32 [out, ceil(in * bits / 32)], of values plus 2^(bits - 1), and
`weight_shape`; others are `weight` in int8 or float8. `weight_scale` has one value for the matrix, a row, a group of
inputs or a block; `weight_zero_point` has the same shape, or is packed along the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from daemon.models.config_values import RawConfig, count
from daemon.models.files import ModelError
from daemon.models.quantised.fp8 import block_size
from daemon.models.quantised.matrix import (
    FLOATS,
    Arrays,
    Blocks,
    Floats,
    Matrix,
    Parts,
    Scheme,
    checked_index,
    dequantise,
    unpack,
)  # fmt: skip
from daemon.models.safetensors_file import read_array

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_STRATEGIES = ("tensor", "channel", "group", "block")
_IGNORED = tuple(
    f"{what}_{part}" for what in ("input", "output", "k", "v", "q") for part in ("scale", "zero_point", "observer")
)


@dataclass(frozen=True, slots=True)
class _Group:
    """How some modules are quantised. `size`: rows and columns of a block, for the strategies group and block."""

    targets: tuple[str, ...]
    kind: Literal["int", "float"]
    bits: int
    strategy: str
    size: tuple[int, int]
    symmetric: bool

    def names(self, module: str) -> bool:
        """Return True if a target is the name of the module, or a pattern of it."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module for target in self.targets
        )


def read_compressed_tensors(raw: RawConfig) -> Scheme:
    """Return the scheme of a quantization_config. Raises ModelError."""
    layout = raw.get("format")
    groups = raw.get("config_groups")
    if layout not in (*_FORMATS, "mixed-precision"):
        raise ModelError(f"format is {layout!r}; supported are {', '.join(_FORMATS)}")
    if not isinstance(groups, dict) or not groups:
        raise ModelError("config_groups is missing")
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise ModelError(f"sparsity_config is {sparsity!r}; supported is the format 'dense'")
    if raw.get("transform_config"):
        raise ModelError("transform_config is set; transforms are not supported")
    return Scheme(
        ("weight_scale",), _PARTS, _IGNORED, partial(_matrix, [_group(name, group) for name, group in groups.items()])
    )


def _group(name: str, raw: object) -> _Group:
    try:
        if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
            raise ModelError("weights is missing")
        if raw.get("format") not in (None, *_FORMATS):
            raise ModelError(f"format is {raw['format']!r}; supported are {', '.join(_FORMATS)}")
        targets, weights = raw.get("targets"), raw["weights"]
        if not isinstance(targets, list):
            raise ModelError("targets must be a list of names")
        kind, bits = weights.get("type", "int"), count(weights, "num_bits", 8)
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise ModelError(
                f"weights have type {kind!r} and num_bits {bits}; supported are int 4, int 8 and float 8"
            )
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
        if strategy not in _STRATEGIES:
            raise ModelError(f"strategy is {strategy!r}; supported are {', '.join(_STRATEGIES)}")
        if weights.get("group_size") == -1:
            strategy = "channel"
        size = (1, count(weights, "group_size")) if strategy == "group" else (1, 1)
        if strategy == "block":
            size = block_size(weights.get("block_structure") or "missing", "block_structure") or (1, 1)
        _check_patterns(targets)
        symmetric = weights.get("symmetric", True) is not False
        return _Group(tuple(map(str, targets)), kind, bits, strategy, size, symmetric)
    except ModelError as e:
        raise ModelError(f"config_groups.{name}: {e}") from None


def _check_patterns(targets: Sequence[object]) -> None:
    for target in targets:
        try:
            re.compile(str(target).removeprefix("re:") if str(target).startswith("re:") else "")
        except re.error as e:
            raise ModelError(f"targets has {target!r}, which is not a regular expression: {e}") from None


def _group_of(groups: Sequence[_Group], module: str) -> _Group:
    """Return the group of a module: the only one, one that names it, or the one of all linear layers."""
    named = [group for group in groups if group.names(module)]
    linear = [group for group in groups if "Linear" in group.targets]
    if len(groups) > 1 and not named + linear:
        raise ModelError(f"quantization_config has no config_groups for {module}, which is quantised")
    return (named + linear + list(groups))[0]


def _matrix(groups: Sequence[_Group], parts: Parts) -> Matrix:
    group = _group_of(groups, parts.module)
    packed = "weight_packed" in parts.tensors
    dtype = "F8_E4M3" if group.kind == "float" else "I8"
    shape = _packed_shape(group, parts) if packed else parts.shape("weight", (dtype,))
    blocks = _check_scales(group, parts, shape)
    zeros_of = _zeros(group, parts, blocks)
    shift = float(2 ** (group.bits - 1)) if packed else 0.0

    def decode(arrays: Arrays) -> Floats:
        values = unpack(arrays["weight_packed"], group.bits)[:, : shape[1]] if packed else arrays["weight"]
        index = arrays.get("weight_g_idx") if group.strategy == "group" else None
        if index is not None and -1 in index:  # it was never set
            index = None
        index = checked_index(index, blocks[1], group.size[1], f"{parts.module}.weight_g_idx")
        scales = Blocks(arrays["weight_scale"].reshape(blocks), group.size, index)
        return dequantise(values, scales, scales._replace(values=zeros_of(arrays)) if zeros_of else None, shift)

    by_row = group.kind == "float" and group.strategy in ("tensor", "channel") and zeros_of is None
    return parts.matrix(shape, decode, "weight_scale" if by_row else "")


def _packed_shape(group: _Group, parts: Parts) -> tuple[int, int]:
    parts.expect("weight_shape", ("I64", "I32"), (2,))
    rows, columns = map(int, read_array(parts.tensors["weight_shape"]))
    parts.expect("weight_packed", ("I32",), (rows, -(-columns * group.bits // 32)))
    return rows, columns


def _check_scales(group: _Group, parts: Parts, shape: tuple[int, ...]) -> tuple[int, int]:
    """Check the scales; return the number of blocks along the outputs and the inputs."""
    rows, columns = shape
    blocks = {
        "tensor": (1, 1),
        "channel": (rows, 1),
        "group": (rows, -(-columns // group.size[1])),
        "block": (-(-rows // group.size[0]), -(-columns // group.size[1])),
    }[group.strategy]
    parts.expect("weight_scale", FLOATS, *_shapes(blocks))
    if "weight_g_idx" in parts.tensors:
        parts.expect("weight_g_idx", ("I32", "I64"), (columns,))
    return blocks


def _shapes(blocks: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return the shapes in which one value for each block is stored."""
    shapes: list[tuple[int, ...]] = [blocks]
    if blocks[1] == 1:
        shapes.append(blocks[:1])
    if blocks == (1, 1):
        shapes.append(())
    return shapes


def _zeros(group: _Group, parts: Parts, blocks: tuple[int, int]) -> Callable[[Arrays], Floats] | None:
    """Return a function from the arrays of a matrix to its zero points, of the shape `blocks`; None if they are 0."""
    name = "weight_zero_point"
    stored = parts.tensors.get(name)
    if stored is None and group.symmetric:
        return None
    if stored is not None and stored.dtype == "I32":
        rows, columns = blocks
        parts.expect(name, ("I32",), (-(-rows * group.bits // 32), columns))
        offset = 2 ** (group.bits - 1)
        return lambda arrays: unpack(arrays[name].T, group.bits)[:, :rows].T.astype(np.float32) - offset
    parts.expect(name, (*FLOATS, "I8", "F8_E4M3"), *_shapes(blocks))
    return lambda arrays: arrays[name].reshape(blocks).astype(np.float32)
