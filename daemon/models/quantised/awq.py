"""AWQ in the layout of its GEMM kernels: 4 bits, packed along the outputs of a layer, eight to a word.

`qweight` is int32 [in, out / 8], `scales` [groups, out], `qzeros` int32 [groups, out / 8].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from daemon.models.config_values import RawConfig
from daemon.models.files import ModelError
from daemon.models.quantised.gptq import group_size
from daemon.models.quantised.matrix import (
    FLOATS,
    Arrays,
    Floats,
    Matrix,
    Parts,
    Scheme,
    dequantise,
    spread,
    unpack,
)  # fmt: skip

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in a word of each of its eight outputs, from the lowest bits


def read_awq(raw: RawConfig) -> Scheme:
    """Return the scheme of a quantization_config. Raises ModelError."""
    bits, size = ("w_bit", "q_group_size") if "w_bit" in raw else ("bits", "group_size")
    if raw.get(bits, 4) != 4:
        raise ModelError(f"{bits} is {raw[bits]!r}; supported is 4")
    if str(raw.get("version", "gemm")).lower() != "gemm":
        raise ModelError(f"version is {raw['version']!r}; supported is 'gemm'")
    if raw.get("zero_point", True) is not True:
        raise ModelError(f"zero_point is {raw['zero_point']!r}; supported is true")
    return Scheme(("qweight",), ("qweight", "qzeros", "scales"), (), partial(_matrix, group_size(raw, size)))


def _matrix(size: int, parts: Parts) -> Matrix:
    width, words = parts.shape("qweight", ("I32",))
    out = words * 8
    size = size or width
    groups = -(-width // size)
    parts.expect("scales", FLOATS, (groups, out))
    parts.expect("qzeros", ("I32",), (groups, words))

    def decode(arrays: Arrays) -> Floats:
        scales, zeros = arrays["scales"].T, _ordered(arrays["qzeros"]).astype(np.float32)
        scales, zeros = (spread(x, (out, width), (1, size)) for x in (scales, zeros))
        return dequantise(_ordered(arrays["qweight"]), scales, zeros)

    return parts.matrix((out, width), decode)


def _ordered(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Unpack words [n, out / 8] and return [out, n]."""
    values = unpack(words, 4).reshape(len(words), -1, 8)[..., _ORDER]
    return np.ascontiguousarray(values.reshape(len(words), -1).T)
