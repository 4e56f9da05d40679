"""Element-wise operations of the model behind one protocol: FlashInfer's kernels, or plain torch on any device."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import Inputs

_FP8_MAX = 448.0  # of e4m3; larger values become NaN


class HeadNorms(NamedTuple):
    """RMSNorm of each head of queries and keys, before they are rotated. Weights [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class Ops(Protocol):
    """The operations of a layer beside attention and matrix products. [n]: tokens of the step.

    All norms add the model's `norm_offset` to their weights, in float32.
    """

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x [n, width] normalised, in `out`, which may be x, or in a new tensor. Rows may be slices."""
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
        norms: HeadNorms | None = None,
    ) -> None:
        """Apply `norms` and the rotary embedding to q [n, heads, head_dim] in place, and append k and v to the KV.

        k [n, kv_heads, head_dim], treated like q, and v are written to their places in the pages `keys` and `values`
        [blocks, block_size, kv_heads, head_dim]. Strides between tokens may have any value. angles
        float32[max_len, rotated]: cosines, then sines, rotated / 2 each; other columns of a head are not rotated. May
        change k and v.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """Write silu(first half) * second half of [n, 2 * width] to out [n, width]."""
        ...

    def gelu_tanh_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """Write gelu(first half) * second half of [n, 2 * width] to out [n, width]; gelu by its tanh formula."""
        ...

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write x @ weight.T to `out`, float32 [n, vocab].

        Logits rounded to bfloat16 would have ties that the model does not have.
        """
        ...


class TorchOps:
    """The reference: float32 between the roundings that the kernels make too."""

    def __init__(self, norm_offset: float = 0.0) -> None:
        self._norm_offset = norm_offset

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normalised = (wide * scale * (weight.float() + self._norm_offset)).to(x.dtype)
        return normalised if out is None else out.copy_(normalised)

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
        norms: HeadNorms | None = None,
    ) -> None:
        if norms is not None:
            self.rms_norm(q, norms.q, norms.eps, out=q)
            self.rms_norm(k, norms.k, norms.eps, out=k)
        self.rotate(inputs.positions, q, k, angles)
        page, place = inputs.positions.long() // keys.shape[1], inputs.positions.long() % keys.shape[1]
        blocks = inputs.kv_indices[inputs.kv_indptr[inputs.rows.long()].long() + page].long()
        keys[blocks, place], values[blocks, place] = to_pool_dtype(k, keys.dtype), to_pool_dtype(v, values.dtype)

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> None:
        """Rotate the first columns of q and k in place. positions: int32[n]."""
        cos, sin = angles[positions.long()].unsqueeze(1).chunk(2, -1)
        for heads in (q, k):
            rotated = heads[..., : angles.shape[1]]
            low, high = rotated.float().chunk(2, -1)
            rotated.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], -1))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        out.copy_(F.silu(gate.float()) * up.float())

    def gelu_tanh_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        out.copy_(F.gelu(gate.float(), approximate="tanh") * up.float())

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(F.linear(x.float(), weight.float()))


def to_pool_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert `x` to the dtype of the pool: unchanged, or clamped to e4m3 with scale 1. May change x."""
    return x if x.dtype == dtype else x.clamp_(-_FP8_MAX, _FP8_MAX).to(dtype)


class FlashInferOps:
    """FlashInfer's kernels, for bfloat16 on CUDA.

    Some are our own. The append replaces two kernels of FlashInfer, with e4m3 six. FlashInfer's SiLU computes part of
    each row twice.

    The modules' functions are called without FlashInfer's Python around them: the host launches the operations of
    a pass of chunks one by one, and small models wait for it. All of them can be captured in a graph. Raises
    KernelError if our kernels are not built.

    `norm_offset`: 0, or 1, for which FlashInfer has kernels: a weight plus 1 would lose bits in bfloat16.
    """

    def __init__(self, device: torch.device, norm_offset: float = 0.0) -> None:
        from flashinfer.norm import get_norm_module
        from flashinfer.utils import device_support_pdl

        norm: Any = get_norm_module()
        if norm_offset:
            self._rmsnorm, self._fused_add_rmsnorm = norm.gemma_rmsnorm, norm.gemma_fused_add_rmsnorm
        else:
            self._rmsnorm, self._fused_add_rmsnorm = norm.rmsnorm, norm.fused_add_rmsnorm
        self._norm_offset = norm_offset
        self._pdl: bool = device_support_pdl(device)
        self._append = kernels.load_append().append
        activations = kernels.load_silu()
        self._silu_mul, self._gelu_tanh_mul = activations.silu_mul, activations.gelu_tanh_mul

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x) if out is None else out
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
        norms: HeadNorms | None = None,
    ) -> None:
        places = inputs.kv_indices, inputs.kv_indptr, inputs.rows, inputs.positions
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        self._append(q, k, v, keys, values, *places, angles, q_norm, k_norm, self._norm_offset, eps)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._silu_mul(gate_up, out)

    def gelu_tanh_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._gelu_tanh_mul(gate_up, out)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
