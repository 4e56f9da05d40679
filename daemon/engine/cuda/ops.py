"""Element-wise work of the model, behind one seam: FlashInfer's kernels, or plain torch on any device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F


class Ops(Protocol):
    """What a layer does beside attention and matrix products. [n]: tokens of the step."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [n, hidden], normalised; x stays."""
        ...

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """In place: residual += x, then x = residual normalised. Both [n, hidden]."""
        ...

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> None:
        """Rotary embedding in place. positions int32[n]; q [n, heads, head_dim], k [n, kv_heads, head_dim], with any
        strides but the last; angles float32[max_len, head_dim]: cosines, then sines, each head_dim / 2."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of [n, 2 * width]: [n, width]."""
        ...

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """x @ weight.T into `out`, float32 [n, vocab]: logits rounded to bfloat16 tie where the model does not."""
        ...


class TorchOps:
    """The definition, in float32 between the roundings that the kernels make too."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        residual.add_(x)
        x.copy_(self.rms_norm(residual, weight, eps))

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> None:
        cos, sin = angles[positions.long()].unsqueeze(1).chunk(2, -1)
        for heads in (q, k):
            low, high = heads.float().chunk(2, -1)
            heads.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], -1))

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(F.linear(x.float(), weight.float()))


class FlashInferOps:
    """FlashInfer's kernels, for bfloat16 on CUDA; all of them can be captured in a graph."""

    def __init__(self) -> None:
        import flashinfer

        self._fi: Any = flashinfer

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._fi.rmsnorm(x, weight, eps=eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        self._fi.fused_add_rmsnorm(x, residual, weight, eps=eps)

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> None:
        self._fi.apply_rope_with_cos_sin_cache_inplace(
            positions=positions, query=q.flatten(1), key=k.flatten(1), head_size=q.shape[-1], cos_sin_cache=angles,
            is_neox=True,
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._fi.silu_and_mul(gate_up)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
