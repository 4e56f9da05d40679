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


class Matrix(NamedTuple):
    """A quantised matrix of a checkpoint. `decode` computes its values, of `shape` [out, in], from its parts."""

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    decode: Callable[[Arrays], Floats]

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

    def matrix(self, shape: tuple[int, ...], decode: Callable[[Arrays], Floats]) -> Matrix:
        return Matrix(shape, self.tensors, decode)


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


def dequantise(values: npt.NDArray[Any], scales: Floats, zeros: npt.NDArray[Any] | float) -> Floats:
    """Return (values - zeros) * scales. All have the shape of `values`, or one that broadcasts to it."""
    out = values.astype(np.float32)
    out -= zeros
    out *= scales
    return out


def spread(blocks: npt.NDArray[Any], shape: tuple[int, ...], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Return what belongs to each element of a matrix of `shape`, from one value for each block of `size`.

    The blocks at the end may be cut. Axes with one block keep the length 1.
    """
    if blocks.shape[1] > 1 and size[1] > 1:
        blocks = np.repeat(blocks, size[1], axis=1)[:, : shape[1]]
    if blocks.shape[0] > 1 and size[0] > 1:
        blocks = np.repeat(blocks, size[0], axis=0)[: shape[0]]
    return blocks


def by_index(groups: npt.NDArray[Any], index: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
    """Return the column of `groups` [out, groups] for each input, by its group. Raises ModelError."""
    if index.min() < 0 or index.max() >= groups.shape[1]:
        raise ModelError(f"{what} has groups up to {index.max()}; the scales have {groups.shape[1]}")
    return groups[:, index]
