"""GPTQ: whole numbers of 4 or 8 bits, packed along the inputs of a layer, with a scale and a zero point by group.

`qweight` is int32 [in * bits / 32, out], `scales` [groups, out], `qzeros` int32 [groups, out * bits / 32], `g_idx`
[in] the group of each input. The first version of the format stores zero points minus one.
"""

from __future__ import annotations

from functools import partial

from daemon.models.config_values import RawConfig, count, refuse
from daemon.models.files import ModelError
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

_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(raw: RawConfig) -> Scheme:
    """Return the scheme of a quantization_config. Raises ModelError."""
    bits = count(raw, "bits")
    if bits not in (4, 8):
        raise ModelError(f"bits is {bits}; supported are 4 and 8")
    layout = raw.get("checkpoint_format") or "gptq"
    if layout not in _OFFSETS:
        raise ModelError(f"checkpoint_format is {layout!r}; supported are 'gptq' and 'gptq_v2'")
    refuse(raw, "is_marlin_format", "the order of Marlin kernels is not supported")
    if (raw.get("pack_dtype") or "int32") != "int32":
        raise ModelError(f"pack_dtype is {raw['pack_dtype']!r}; supported is 'int32'")
    rules = raw.get("dynamic") or {}  # exceptions by the name of a module; "-:" means that it is not quantised
    if not isinstance(rules, dict) or not all(str(rule).startswith("-:") for rule in rules):
        raise ModelError("dynamic has modules that are quantised in another way than the others")
    return Scheme(("qweight",), _PARTS, (), partial(_matrix, bits, group_size(raw, "group_size"), _OFFSETS[layout]))


def group_size(raw: RawConfig, key: str) -> int:
    """Return the number of inputs that have a scale in common; 0: all of a row. Raises ModelError."""
    return 0 if raw.get(key) in (-1, None) else count(raw, key)


def _matrix(bits: int, size: int, offset: int, parts: Parts) -> Matrix:
    words, out = parts.shape("qweight", ("I32",))
    width = words * 32 // bits
    size = size or width
    groups = -(-width // size)
    parts.expect("scales", FLOATS, (groups, out))
    parts.expect("qzeros", ("I32",), (groups, out * bits // 32))
    if "g_idx" in parts.tensors:
        parts.expect("g_idx", ("I32", "I64"), (width,))

    def decode(arrays: Arrays) -> Floats:
        # The addition wraps, as in AutoGPTQ. Words are transposed before they are unpacked: they are fewer.
        zeros = (unpack(arrays["qzeros"], bits) + offset) & (2**bits - 1)
        index = checked_index(arrays.get("g_idx"), groups, size, f"{parts.module}.g_idx")
        scales = Blocks(arrays["scales"].T, (1, size), index)
        return dequantise(unpack(arrays["qweight"].T, bits), scales, scales._replace(values=zeros.T))

    return parts.matrix((out, width), decode)
