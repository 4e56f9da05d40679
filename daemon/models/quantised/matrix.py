"""What a file in this folder gives: a `Scheme`; and the arithmetic that the methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daemon.models.files import ModelError
from daemon.models.safetensors_file import Tensor, check_size, read_array

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]  # the parts of a matrix, by the last component of their names
FLOATS = ("F32", "F16", "BF16")
_SLAB = 64  # rows of a matrix whose blocks have no order


class Matrix(NamedTuple):
    """A quantised matrix of a checkpoint. `decode` computes its values, of `shape` [out, in], from its parts.

    `row_scales`: if the part `weight` is e4m3 and has one factor for each row, or one for all, the part that has
    them; otherwise "".
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    decode: Callable[[Arrays], Floats]
    row_scales: str = ""

    def read(self) -> Floats:
        """Return the dequantised matrix in float32."""
        return self.decode({name: read_array(part) for name, part in self.parts.items()})


class Parts:
    """The stored parts of a matrix. Each error names the tensor."""

    def __init__(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        self.module = module
        self.tensors = tensors

    def shape(self, part: str, dtypes: tuple[str, ...], dims: int = 2) -> tuple[int, ...]:
        """Return the shape of a part. Raises ModelError if it is missing or has another dtype or number of axes."""
        name, tensor = f"{self.module}.{part}", self.tensors.get(part)
        if tensor is None:
            raise ModelError(f"the weights lack the tensor {name}")
        if tensor.dtype not in dtypes or len(tensor.shape) != dims:
            raise ModelError(
                f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}; its quantization_config needs "
                f"{' or '.join(dtypes)} with {dims} axes"
            )
        check_size(f"{tensor.file}: {name}", tensor)
        return tensor.shape

    def expect(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raise ModelError unless a part has one of these dtypes and shapes."""
        tensor = self.tensors.get(part)
        shape = self.shape(part, dtypes, len(tensor.shape) if tensor else 0)
        if tensor is not None and shape not in shapes:
            raise ModelError(
                f"{tensor.file}: {self.module}.{part} has shape {list(shape)}; its quantization_config needs "
                f"{' or '.join(str(list(s)) for s in shapes)}"
            )

    def matrix(self, shape: tuple[int, ...], decode: Callable[[Arrays], Floats], row_scales: str = "") -> Matrix:
        return Matrix(shape, self.tensors, decode, row_scales)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint quantises its matrices. All names are the last components of tensor names.

    A module with a tensor of a name in `marks` is quantised; its tensors of names in `parts` are one matrix, which
    `matrix` describes. Raises ModelError if they do not fit. `ignored`: tensors that only quantised activations or a
    quantised KV cache need.
    """

    marks: tuple[str, ...]
    parts: tuple[str, ...]
    ignored: tuple[str, ...]
    matrix: Callable[[Parts], Matrix]


def unpack(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Return the whole numbers of 4 or 8 bits in each row of int32 words, the lowest bits of a word first."""
    data = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if bits == 8:
        return data
    out = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.uint8)
    out[..., 0::2] = data & 15
    out[..., 1::2] = data >> 4
    return out


def dequantise(values: npt.NDArray[Any], scales: Blocks, zeros: Blocks | None = None, shift: float = 0.0) -> Floats:
    """Return (values - shift - zeros) * scales in float32; `values` themselves change if they are float32."""
    out = np.ascontiguousarray(values, dtype=np.float32)
    if shift:
        out -= np.float32(shift)
    if zeros is not None:
        zeros.apply(np.subtract, out)
    scales.apply(np.multiply, out)
    return out


class Blocks(NamedTuple):
    """One number for each block of a matrix. `size`: rows and columns of a block; those at the end may be cut.

    An axis of `values` with the length 1 has one block. `group`: instead the block of each column.
    """

    values: npt.NDArray[Any]
    size: tuple[int, int] = (1, 1)
    group: npt.NDArray[Any] | None = None

    def apply(self, operation: np.ufunc, matrix: Floats) -> None:
        """Compute operation(element, number of its block) in place, without temporary arrays as large as `matrix`."""
        rows, columns = self.size
        height, width = matrix.shape
        blocks, group = np.ascontiguousarray(self.values, dtype=np.float32), self.group
        if rows > 1 and len(blocks) > 1:
            blocks = np.repeat(blocks, rows, axis=0)[:height]
        if group is None and blocks.shape[1] * columns > width > columns:
            group = np.arange(width) // columns
        if group is not None:
            for i in range(0, height, _SLAB):
                part = matrix[i : i + _SLAB]
                operation(part, (blocks[i : i + _SLAB] if len(blocks) > 1 else blocks).take(group, 1), out=part)
        elif blocks.shape[1] == 1 or columns == 1:
            operation(matrix, blocks, out=matrix)
        else:
            parts = matrix.reshape(height, -1, columns)
            operation(parts, blocks[..., np.newaxis], out=parts)


def checked_index(index: npt.NDArray[Any] | None, groups: int, size: int, what: str) -> npt.NDArray[Any] | None:
    """Return the group of each input; None if the groups are in order. Raises ModelError for a group that is none."""
    if index is None or np.array_equal(index, np.arange(len(index)) // size):
        return None
    if index.min() < 0 or index.max() >= groups:
        raise ModelError(f"{what} has groups up to {index.max()}; the scales have {groups}")
    return index
