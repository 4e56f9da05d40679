"""The forward pass of one to four decodes, by our own products (`gemv.cu`) instead of cuBLAS and kernels in between.

Of so few rows nothing but the weights takes time, so what counts is that reading them never pauses. A layer is six
kernels instead of ten: each product takes norm, rotation, append to the KV cache, SiLU or residual along, and
fetches its first weights while the kernel in front of it ends. Attention reads little and the memory would idle
meanwhile: the product before it can have the weights of the one behind it fetched into the device's cache.
Which `Way` is the quickest on a device is measured when graphs are captured (`graphs.py`). No speed has been
measured yet.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from daemon.engine.cuda.arrays import Inputs
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.weights import DeviceWeights, Layer
from daemon.models.model_config import ModelConfig

Way = Literal["all rows", "few rows", "few rows, ahead"]
"""How decodes are computed: as any pass, as `FewRows` does, or so and with weights fetched ahead of attention."""

MOST_ROWS = 4
_COLUMNS = 8  # that are read at a time
_STATIC = 1024  # bytes of a block's memory that are not for rows


class Gemv(Protocol):
    """Products of `x`, bfloat16[rows, width], of at most MOST_ROWS rows, with `weight`, bfloat16[n, width]; `bias`
    [n] or None. With `norm` [width], of the rows' RMSNorm. Sums are float32; each result is rounded once. They can be
    captured in a graph, and raise for tensors that do not fit."""

    def add(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """residual [rows, n] += the product, in place."""
        ...

    def gate(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out [rows, n / 2] = silu(first half of the product) * second half."""
        ...

    def logits(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out float32[rows, n] = the product."""
        ...

    def heads(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        indptr: torch.Tensor,
        positions: torch.Tensor,
        angles: torch.Tensor,
        ahead: torch.Tensor | None,
    ) -> None:
        """The fused product of query, key and value. Queries, rotated, go to q [rows, heads, head_dim]; keys,
        rotated, and values into pages [blocks, block_size, kv_heads, head_dim], bfloat16 or e4m3, where row i's
        sequence, whose blocks are ``indices[indptr[i] : indptr[i + 1]]``, has position ``positions[i]``. `angles`:
        see `Ops.append`. `ahead`, bfloat16[n, m]: weights to be fetched into the device's cache at the end."""
        ...


def few_buckets(buckets: tuple[int, ...], config: ModelConfig, shared_memory: int) -> tuple[int, ...]:
    """Those of `buckets` that such a pass can compute on a device whose blocks have so many bytes of memory."""
    widths = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    if any(width % _COLUMNS for width in widths):
        return ()
    row = max(widths) * torch.bfloat16.itemsize
    return tuple(bucket for bucket in buckets if bucket <= MOST_ROWS and bucket * row <= shared_memory - _STATIC)


class FewRows:
    """The layers and the head of a Llama. `angles`: see `Ops.append`."""

    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, gemv: Gemv, attention: Attention, angles: torch.Tensor
    ) -> None:
        self._weights = weights
        self._gemv = gemv
        self._attention = attention
        self._angles = angles
        self._eps = config.rms_norm_eps
        self._heads, self._head_dim = config.num_heads, config.head_dim

    def logits(self, inputs: Inputs, residual: torch.Tensor, out: torch.Tensor, *, ahead: bool) -> None:
        """Compute decodes from their embeddings `residual` [rows, hidden], which do not survive it; write float32
        logits to `out` [rows, vocab]. `ahead`: see `Way`."""
        for i, layer in enumerate(self._weights.layers):
            self._attend(i, layer, inputs, residual, layer.out.weight if ahead else None)
            gated = residual.new_empty(len(residual), layer.down.weight.shape[1])
            self._gemv.gate(residual, layer.mlp_norm, self._eps, *layer.gate_up, gated)
            self._gemv.add(gated, *layer.down, residual)
        self._gemv.logits(residual, self._weights.norm, self._eps, self._weights.head, out)

    def _attend(
        self, index: int, layer: Layer, inputs: Inputs, residual: torch.Tensor, ahead: torch.Tensor | None
    ) -> None:
        q = residual.new_empty(len(residual), self._heads, self._head_dim)
        self._gemv.heads(
            residual,
            layer.attention_norm,
            self._eps,
            *layer.qkv,
            q,
            *self._attention.pages(index),
            inputs.kv_indices,
            inputs.kv_indptr,
            inputs.positions,
            self._angles,
            ahead,
        )
        self._gemv.add(self._attention.attend(index, q, inputs, decode=True).flatten(1), *layer.out, residual)
