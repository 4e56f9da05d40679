"""The forward pass of one to four decodes, by our own products (`gemv.cu`) instead of cuBLAS and separate kernels.

For so few rows only the reading of the weights takes time, so it must never pause. A layer takes six kernels instead
of ten: each product includes the norm, rotary embedding, append to the KV cache, SiLU or residual, and fetches its
first weights while the previous kernel ends. Attention reads little, and the memory would be idle during it. So the
product before attention can prefetch the weights of the product after it into the L2 cache. The fastest `DecodePath`
of a device is measured when graphs are captured (`graphs.py`). No speed has been measured yet.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from daemon.engine.cuda.arrays import Inputs
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.weights import DeviceWeights, Layer
from daemon.models.model_config import ModelConfig

DecodePath = Literal["gemm", "gemv", "gemv, prefetch"]
"""How decodes are computed.

"gemm": as any other pass. "gemv": by `SmallBatch`. "gemv, prefetch": also prefetch weights before attention.
"""

MAX_ROWS = 4
_COLUMNS = 8  # read at a time
_STATIC = 1024  # bytes of a block's shared memory that are not for rows


class Gemv(Protocol):
    """Products of `x`, bfloat16[rows, width] with at most MAX_ROWS rows, and `weight`, bfloat16[n, width].

    `bias`: [n] or None. With `norm` [width], the RMSNorm of the rows is multiplied. Sums are float32, and each result
    is rounded once. The products can be captured in a graph. They raise for tensors that do not fit.
    """

    def add(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """Add the product to residual [rows, n], in place."""
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
        """Write silu(first half of the product) * second half to out [rows, n / 2]."""
        ...

    def logits(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write the product to out, float32[rows, n]."""
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
        prefetch: torch.Tensor | None,
    ) -> None:
        """Compute the fused product of query, key and value.

        Queries, rotated, go to q [rows, heads, head_dim]. Keys, rotated, and values go to the pages
        [blocks, block_size, kv_heads, head_dim], bfloat16 or e4m3. The blocks of row i's sequence are
        ``indices[indptr[i] : indptr[i + 1]]``, its position is ``positions[i]``. `angles`: see `Ops.append`.
        `prefetch`, bfloat16[n, m]: weights to prefetch into the L2 cache at the end.
        """
        ...


def small_batch_buckets(buckets: tuple[int, ...], config: ModelConfig, shared_memory: int) -> tuple[int, ...]:
    """Return the `buckets` that `SmallBatch` can compute: none for a model whose layers differ from a Llama's in more
    than attention. `shared_memory`: bytes that a thread block can have.
    """
    if not _suits(config):
        return ()
    widths = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    if any(width % _COLUMNS for width in widths):
        return ()
    row = max(widths) * torch.bfloat16.itemsize
    return tuple(bucket for bucket in buckets if bucket <= MAX_ROWS and bucket * row <= shared_memory - _STATIC)


def _suits(config: ModelConfig) -> bool:
    whole_heads = [rope.rotary_dim == config.head_dim for rope in config.ropes] == [True]
    return (
        whole_heads
        and not config.experts
        and not config.qk_norm
        and (config.norm_kind, config.norm_offset) == ("pre", 0.0)
        and (config.activation, config.residual_scale) == ("silu", 1.0)
    )


class SmallBatch:
    """The layers and the output head of a Llama. `angles`: see `Ops.append`."""

    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, gemv: Gemv, attention: Attention, angles: torch.Tensor
    ) -> None:
        self._weights = weights
        self._gemv = gemv
        self._attention = attention
        self._angles = angles
        self._eps = config.rms_norm_eps
        self._heads, self._head_dim = config.num_heads, config.head_dim

    def logits(self, inputs: Inputs, residual: torch.Tensor, out: torch.Tensor, *, prefetch: bool) -> None:
        """Compute decodes from their embeddings `residual` [rows, hidden], which are overwritten.

        Write float32 logits to `out` [rows, vocab]. `prefetch`: see `DecodePath`.
        """
        for i, layer in enumerate(self._weights.layers):
            self._attend(i, layer, inputs, residual, layer.out.weight if prefetch else None)
            assert layer.mlp_norm is not None and layer.gate_up is not None and layer.down is not None
            gated = residual.new_empty(len(residual), layer.down.weight.shape[1])
            self._gemv.gate(residual, layer.mlp_norm, self._eps, layer.gate_up.weight, layer.gate_up.bias, gated)
            self._gemv.add(gated, layer.down.weight, layer.down.bias, residual)
        self._gemv.logits(residual, self._weights.norm, self._eps, self._weights.head, out)

    def _attend(
        self, index: int, layer: Layer, inputs: Inputs, residual: torch.Tensor, prefetch: torch.Tensor | None
    ) -> None:
        assert layer.attention_norm is not None
        q = residual.new_empty(len(residual), self._heads, self._head_dim)
        self._gemv.heads(
            residual,
            layer.attention_norm,
            self._eps,
            layer.qkv.weight,
            layer.qkv.bias,
            q,
            *self._attention.pages(index),
            inputs.kv_indices,
            inputs.kv_indptr,
            inputs.positions,
            self._angles,
            prefetch,
        )
        attended = torch.empty_like(q)
        self._attention.attend(index, q, inputs, attended, decode=True)
        self._gemv.add(attended.flatten(1), layer.out.weight, layer.out.bias, residual)
