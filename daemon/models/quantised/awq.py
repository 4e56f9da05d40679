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
from daemon.models.quantised.matrix import FLOATS, Arrays, Blocks, Floats, Matrix, Parts, Scheme, dequantise

_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, from its lowest bits


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
        scales = Blocks(arrays["scales"].T, (1, size))
        return dequantise(_rows(arrays["qweight"]), scales, scales._replace(values=_rows(arrays["qzeros"])))

    return parts.matrix((out, width), decode)


def _rows(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Unpack words [n, out / 8] and return [out, n]. Words are transposed before: they are fewer."""
    data = np.ascontiguousarray(words.T, dtype="<i4").view(np.uint8).reshape(words.shape[1], len(words), 4)
    out = np.empty((words.shape[1], 8, len(words)), np.uint8)
    for place, output in enumerate(_OUTPUTS):
        byte = data[..., place // 2]
        out[:, output] = byte >> 4 if place % 2 else byte & 15
    return out.reshape(-1, len(words))
