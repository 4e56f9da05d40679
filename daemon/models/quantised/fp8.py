"""FP8 as DeepSeek, Qwen3, AutoFP8 and Transformers write it: float8 matrices with a factor for each block, each row,
or the whole."""

from __future__ import annotations

import math
from functools import partial

from daemon.models.config_values import RawConfig
from daemon.models.files import ModelError
from daemon.models.quantised.matrix import FLOATS, Arrays, Blocks, Floats, Matrix, Parts, Scheme, dequantise

_SCALES = ("weight_scale_inv", "weight_scale")  # both multiply
_IGNORED = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_scale")


def read_fp8(raw: RawConfig) -> Scheme:
    """Return the scheme of a quantization_config. Raises ModelError."""
    if raw.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ModelError(f"fmt is {raw['fmt']!r}; supported is 'e4m3'")
    if raw.get("activation_scheme", "dynamic") not in ("dynamic", "static"):
        raise ModelError(f"activation_scheme is {raw['activation_scheme']!r}; supported are 'dynamic' and 'static'")
    block = block_size(raw.get("weight_block_size"), "weight_block_size")
    return Scheme(_SCALES, ("weight", *_SCALES), _IGNORED, partial(_matrix, block))


def block_size(value: object, key: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None if `value` is. Raises ModelError, with the key."""
    match value:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ModelError(f"{key} is {value!r}; it must be a list of two positive whole numbers")


def _matrix(block: tuple[int, int] | None, parts: Parts) -> Matrix:
    out, width = shape = parts.shape("weight", ("F8_E4M3",))
    name = next(n for n in _SCALES if n in parts.tensors)
    rows, columns = size = block or (1, width)
    shapes = [(), (1,), (1, 1), (-(-out // rows), -(-width // columns))]
    if not block:
        shapes.append((out,))
    parts.expect(name, (*FLOATS, "F8_E8M0"), *shapes)

    def decode(arrays: Arrays) -> Floats:
        scales = arrays[name]
        blocks = scales.reshape(-1, 1) if scales.ndim < 2 else scales
        return dequantise(arrays["weight"], Blocks(blocks, size))

    by_row = parts.tensors[name].dtype in FLOATS and math.prod(parts.tensors[name].shape) in (1, out)
    return parts.matrix(shape, decode, name if by_row and not block else "")
