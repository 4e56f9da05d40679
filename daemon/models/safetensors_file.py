"""Safetensors files: their headers, and the numbers of a tensor.

Format: length of the header (u64, little-endian), a JSON header with dtype, shape and byte range of every tensor,
then the data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daemon.models.files import ModelError

_MAX_HEADER = 100 << 20
_STORED = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip


class Tensor(NamedTuple):
    """Location of a tensor. `start` and `end` are byte offsets from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name. Raises ModelError if it is truncated or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ModelError(f"{file} is truncated or not a safetensors file ({size} bytes)")
            raw = json.loads(f.read(length))
    except OSError as e:
        raise ModelError(f"cannot read {file}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not a safetensors file: its header is not JSON") from None
    try:
        tensors = {n: _tensor(file, t, 8 + length) for n, t in raw.items() if n != "__metadata__"}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{file} has a damaged safetensors header; download it again") from None
    end = max((t.end for t in tensors.values()), default=8 + length)
    if end > size:
        raise ModelError(f"{file} is truncated: {size} of {end} bytes; download it again")
    return tensors


def check_size(what: str, tensor: Tensor) -> None:
    """Raise ModelError, which begins with `what`, unless the byte range of a tensor has the size of its shape."""
    stored = _STORED.get(tensor.dtype)
    if stored is None:
        raise ModelError(f"{what} is stored as {tensor.dtype}, which is not supported")
    if tensor.end - tensor.start != math.prod(tensor.shape) * np.dtype(stored).itemsize:
        raise ModelError(f"{what}: its byte range does not match its shape; the file is damaged, download it again")


def read_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Read a tensor whose size is checked: floats of any size as float32, whole numbers as stored."""
    try:
        count = math.prod(tensor.shape)
        raw = np.fromfile(tensor.file, _STORED[tensor.dtype], count, offset=tensor.start).reshape(tensor.shape)
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot read {tensor.file}: {e}") from None
    match tensor.dtype:
        case "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        case "F8_E4M3":
            return _e4m3().take(raw, mode="clip")
        case "F8_E5M2":  # the upper byte of a float16
            return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        case "F8_E8M0":  # an exponent; 255 is NaN
            return np.where(raw == 255, np.float32(np.nan), np.ldexp(np.float32(1), raw.astype(np.int32) - 127))
    return raw.astype(np.float32) if tensor.dtype in ("F16", "F32") else raw


def _e4m3() -> npt.NDArray[np.float32]:
    """Return the value of each byte in float8_e4m3fn: 1 bit of sign, 4 of exponent, 3 of mantissa, no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def _tensor(file: Path, raw: dict[str, object], base: int) -> Tensor:
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError
    start, end = offsets
    return Tensor(file, str(raw["dtype"]), tuple(int(n) for n in shape), base + int(start), base + int(end))
