"""Numba kernels for the operations between the linear layers; each makes one pass over its rows.

Activations are float32, or bfloat16 stored as uint16 bits (numba has no bfloat16). The residual stream, norm weights
and all sums are float32. Each kernel computes a row by itself, in a fixed order, so a row's bits do not depend on the
other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from daemon.engine.jit import F32, kernel, prange  # isort: skip  first: it points numba at its cache
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import overload


def widen(x: Any) -> Any:
    """Return the float32 value of a float32, or of a bfloat16's bits. Only for compiled code."""
    raise NotImplementedError


@overload(widen, jit_options={"forceinline": True})
def _widen(x: Any) -> Callable[..., Any]:
    def same(x: Any) -> Any:
        return x

    def from_bf16(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    return from_bf16 if x == types.uint16 else same


def narrow(x: Any, like: Any) -> Any:
    """Return `x` (float32) as an element of the array `like`: unchanged, or the bits of the nearest bfloat16.

    Only for compiled code.
    """
    raise NotImplementedError


@overload(narrow, jit_options={"forceinline": True})
def _narrow(x: Any, like: Any) -> Callable[..., Any]:
    def same(x: Any, like: Any) -> Any:
        return x

    def to_bf16(x: Any, like: Any) -> Any:
        bits = np.float32(x).view(np.uint32)
        even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))

    return to_bf16 if like.dtype == types.uint16 else same


@kernel(inline=True, fastmath=True)
def exp2_nonpositive(x: F32) -> F32:
    """Return 2**x for x <= 0, with an error of about 1e-7. A call of libm's exp would keep loops scalar."""
    x = max(x, np.float32(-126.0))
    n = np.int32(x - np.float32(0.5))
    f = x - np.float32(n)
    p = np.float32(1.32669704e-3)
    p = p * f + np.float32(9.67545975e-3)
    p = p * f + np.float32(5.55074262e-2)
    p = p * f + np.float32(2.40221218e-1)
    p = p * f + np.float32(6.93146949e-1)
    p = p * f + np.float32(1.00000007)
    return p * np.uint32(np.uint32(n + np.int32(127)) << np.uint32(23)).view(np.float32)


class Ops(NamedTuple):
    """The compiled kernels."""

    add_rms_norm: Callable[..., None]
    add_rows: Callable[..., None]
    norm_groups: Callable[..., None]
    silu_mul: Callable[..., None]
    gelu_tanh_mul: Callable[..., None]
    rope_and_store: Callable[..., None]
    add_experts: Callable[..., None]


def add_rms_norm(residual: Any, delta: Any, rows: Any, weight: Any, eps: Any, out: Any) -> None:
    """Add `delta` to the residual stream in place, then write the normalised row ``rows[i]`` to ``out[i]``.

    residual [tokens, hidden] f32; delta has the same shape, f32 or bf16; rows [n] int32; weight [hidden] f32;
    eps float32; out [n, hidden].
    """
    hidden = residual.shape[1]
    for i in prange(rows.shape[0]):
        r = rows[i]
        squares = np.float32(0.0)
        for j in range(hidden):
            x = residual[r, j] + widen(delta[r, j])
            residual[r, j] = x
            squares += x * x
        scale = np.float32(1.0) / np.float32(np.sqrt(squares / np.float32(hidden) + eps))
        for j in range(hidden):
            out[i, j] = narrow(residual[r, j] * scale * weight[j], out)


def add_rows(residual: Any, delta: Any, rows: Any, out: Any) -> None:
    """Add `delta` to the residual stream in place, then copy the row ``rows[i]`` to ``out[i]``. As `add_rms_norm`."""
    for i in prange(rows.shape[0]):
        r = rows[i]
        for j in range(residual.shape[1]):
            x = residual[r, j] + widen(delta[r, j])
            residual[r, j] = x
            out[i, j] = narrow(x, out)


def norm_groups(x: Any, begin: Any, groups: Any, weight: Any, eps: Any) -> None:
    """Normalise, in place, `groups` groups of columns of each row by itself; the first group begins at `begin`.

    x [rows, columns] f32 or bf16; weight [columns of a group] f32; eps float32.
    """
    width = weight.shape[0]
    for r in prange(x.shape[0]):
        for group in range(groups):
            part = x[r, begin + group * width : begin + (group + 1) * width]
            squares = np.float32(0.0)
            for j in range(width):
                value = widen(part[j])
                squares += value * value
            scale = np.float32(1.0) / np.float32(np.sqrt(squares / np.float32(width) + eps))
            for j in range(width):
                part[j] = narrow(widen(part[j]) * scale * weight[j], x)


def silu_mul(gate_up: Any, out: Any) -> None:
    """Compute ``silu(gate) * up``. gate_up [tokens, 2 * width]: gate, then up; out [tokens, width]."""
    size = out.shape[1]
    log2e = np.float32(1.4426950408889634)
    one = np.float32(1.0)
    for r in prange(out.shape[0]):
        gate, up, result = gate_up[r, :size], gate_up[r, size:], out[r]
        for j in range(size):
            x = widen(gate[j])
            e = exp2_nonpositive(-abs(x) * log2e)
            numerator = x if x >= 0 else x * e
            result[j] = narrow(np.divide(numerator, one + e) * widen(up[j]), out)  # `/` would check for zero


def gelu_tanh_mul(gate_up: Any, out: Any) -> None:
    """Compute ``gelu(gate) * up`` with the tanh approximation of gelu: ``x * sigmoid(2 u)`` with
    ``u = sqrt(2 / pi) * (x + 0.044715 x^3)``. Arguments as `silu_mul`."""
    size = out.shape[1]
    double = np.float32(2.0 * 0.7978845608028654 * 1.4426950408889634)  # the change to base 2 included
    cubic = np.float32(0.044715)
    one = np.float32(1.0)
    for r in prange(out.shape[0]):
        gate, up, result = gate_up[r, :size], gate_up[r, size:], out[r]
        for j in range(size):
            x = widen(gate[j])
            e = exp2_nonpositive(-abs(x + cubic * x * x * x) * double)
            numerator = x if x >= 0 else x * e
            result[j] = narrow(np.divide(numerator, one + e) * widen(up[j]), out)


@kernel(inline=True, fastmath=True)
def _rotate(heads: Any, cos: Any, sin: Any, dim: Any, scale: F32, out: Any) -> None:
    """Apply the rotary embedding to every head in one row: it rotates the pairs (i, i + rotary_dim / 2)."""
    half = cos.shape[0]
    for head in range(0, heads.shape[0], dim):
        low, high = heads[head : head + half], heads[head + half : head + 2 * half]
        out_low, out_high = out[head : head + half], out[head + half : head + 2 * half]
        for j in range(half):
            x, y = widen(low[j]), widen(high[j])
            out_low[j] = narrow((x * cos[j] - y * sin[j]) * scale, out)
            out_high[j] = narrow((y * cos[j] + x * sin[j]) * scale, out)
        for j in range(head + 2 * half, head + dim):
            out[j] = narrow(widen(heads[j]) * scale, out)


def rope_and_store(
    qkv: Any,
    positions: Any,
    slots: Any,
    cos: Any,
    sin: Any,
    dim: Any,
    scale: Any,
    layer_offset: Any,
    value_offset: Any,
    kv_width: Any,
    q_out: Any,
    pool: Any,
) -> None:
    """Rotate queries and keys. Write the queries times `scale` to q_out, and keys and values to the pool.

    qkv [tokens, (heads + 2 kv_heads) * head_dim]; positions [tokens] int32; slots [tokens] int64: pool element
    where the token's key of layer 0 begins; cos, sin [positions, rotary_dim / 2] f32; `dim` is head_dim; q_out
    [tokens, heads * head_dim] f32; pool flat. A value is `value_offset` elements after its key; each has `kv_width`
    elements.
    """
    q_width = q_out.shape[1]
    for r in prange(qkv.shape[0]):
        key = slots[r] + layer_offset
        keys, values = pool[key : key + kv_width], pool[key + value_offset : key + value_offset + kv_width]
        row_cos, row_sin = cos[positions[r]], sin[positions[r]]
        _rotate(qkv[r, :q_width], row_cos, row_sin, dim, scale, q_out[r])
        _rotate(qkv[r, q_width : q_width + kv_width], row_cos, row_sin, dim, np.float32(1.0), keys)
        for j in range(kv_width):
            values[j] = narrow(widen(qkv[r, q_width + kv_width + j]), pool)


def add_experts(rows: Any, places: Any, weights: Any, normalise: Any, out: Any) -> None:
    """Write the weighted sum of a token's experts: ``out[i] = sum of weights[i, k] * rows[places[i, k]]``.

    rows [tokens * k, hidden] f32 or bf16; places [tokens, k] int64; weights [tokens, k] f32; out [tokens, hidden].
    `normalise`: divide by the sum of the weights.
    """
    count = places.shape[1]
    for i in prange(out.shape[0]):
        total = np.float32(0.0)
        for k in range(count):
            total += weights[i, k]
        scale = np.float32(1.0) / total if normalise else np.float32(1.0)
        sums = np.zeros(out.shape[1], np.float32)
        for k in range(count):
            weight, row = weights[i, k] * scale, rows[places[i, k]]
            for j in range(sums.shape[0]):
                sums[j] += weight * widen(row[j])
        for j in range(sums.shape[0]):
            out[i, j] = narrow(sums[j], out)


def compile_ops(parallel: bool) -> Ops:
    """Compile the kernels. `parallel`: they divide the rows between numba's threads."""
    functions = (add_rms_norm, add_rows, norm_groups, silu_mul, gelu_tanh_mul, rope_and_store, add_experts)
    return Ops(*(kernel(fastmath=True, parallel=parallel)(f) for f in functions))


def raw(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the tensor as an array for the kernels: bfloat16 as uint16 bits, others as they are. Shares memory."""
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
