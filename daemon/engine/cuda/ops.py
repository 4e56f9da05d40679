"""Element-wise operations of the model behind one protocol: FlashInfer's kernels, or plain torch on any device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import Inputs

_FP8_MAX = 448.0  # of e4m3; larger values become NaN


class Ops(Protocol):
    """The operations of a layer beside attention and matrix products. [n]: tokens of the step."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x [n, hidden] normalised. x does not change."""
        ...

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """In place: residual += x, then x = normalised residual. Both are [n, hidden]."""
        ...

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: Inputs,
        angles: torch.Tensor,
    ) -> None:
        """Apply the rotary embedding to q [n, heads, head_dim] in place, and append k and v to the KV cache.

        k [n, kv_heads, head_dim], rotated too, and v are written to their places in the pages `keys` and `values`
        [blocks, block_size, kv_heads, head_dim]. Strides between tokens may have any value. angles
        float32[max_len, head_dim]: cosines, then sines, head_dim / 2 each. May change k and v.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """Write silu(first half) * second half of [n, 2 * width] to out [n, width]."""
        ...

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write x @ weight.T to `out`, float32 [n, vocab].

        Logits rounded to bfloat16 would have ties that the model does not have.
        """
        ...


class TorchOps:
    """The reference: float32 between the roundings that the kernels make too."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        residual.add_(x)
        x.copy_(self.rms_norm(residual, weight, eps))

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: Inputs,
        angles: torch.Tensor,
    ) -> None:
        self.rotate(inputs.positions, q, k, angles)
        page, place = inputs.positions.long() // keys.shape[1], inputs.positions.long() % keys.shape[1]
        blocks = inputs.kv_indices[inputs.kv_indptr[inputs.rows.long()].long() + page].long()
        keys[blocks, place], values[blocks, place] = to_pool_dtype(k, keys.dtype), to_pool_dtype(v, values.dtype)

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> None:
        """Rotate q and k in place. positions: int32[n]."""
        cos, sin = angles[positions.long()].unsqueeze(1).chunk(2, -1)
        for heads in (q, k):
            low, high = heads.float().chunk(2, -1)
            heads.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], -1))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        out.copy_(F.silu(gate.float()) * up.float())

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(F.linear(x.float(), weight.float()))


def to_pool_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert `x` to the dtype of the pool: unchanged, or clamped to e4m3 with scale 1. May change x."""
    return x if x.dtype == dtype else x.clamp_(-_FP8_MAX, _FP8_MAX).to(dtype)


class FlashInferOps:
    """FlashInfer's kernels, for bfloat16 on CUDA.

    Two are our own. The append replaces two kernels of FlashInfer, with e4m3 six. FlashInfer's SiLU computes part of
    each row twice.

    The modules' functions are called without FlashInfer's Python around them: the host launches the operations of
    a pass of chunks one by one, and small models wait for it. All of them can be captured in a graph. Raises
    KernelError if our kernels are not built.
    """

    def __init__(self, device: torch.device) -> None:
        from flashinfer.norm import get_norm_module
        from flashinfer.utils import device_support_pdl

        norm: Any = get_norm_module()
        self._rmsnorm, self._fused_add_rmsnorm = norm.rmsnorm, norm.fused_add_rmsnorm
        self._pdl: bool = device_support_pdl(device)
        self._append = kernels.load_append().append
        self._silu_mul = kernels.load_silu().silu_mul

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        self._rmsnorm(out, x, weight, eps, self._pdl)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        self._fused_add_rmsnorm(x, residual, weight, eps, self._pdl)

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: Inputs,
        angles: torch.Tensor,
    ) -> None:
        self._append(
            q, k, v, keys, values, inputs.kv_indices, inputs.kv_indptr, inputs.rows, inputs.positions, angles
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._silu_mul(gate_up, out)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
