"""The Llama forward pass in torch, on any device, over `Ops` and `Attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from daemon.engine.cuda.arrays import Inputs
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.ops import Ops
from daemon.engine.cuda.products import Products
from daemon.engine.cuda.small_batch import DecodePath, Gemv, SmallBatch
from daemon.engine.cuda.weights import DeviceWeights, Layer
from daemon.engine.rope import rope_tables
from daemon.models.model_config import ModelConfig

_ALIGNMENT = 256
"""Of each buffer of a pass, in entries. cuBLAS chooses its kernels by the alignment of what they read."""


class Part(NamedTuple):
    """Rows of a pass that share one call of attention: decodes, or chunks.

    `decode`: each row is one token and is sampled.
    """

    inputs: Inputs
    decode: bool


class _PartViews(NamedTuple):
    """A part's tokens in the buffers of a pass: [n, heads or kv_heads, head_dim] each."""

    part: Part
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor


class _Buffers(NamedTuple):
    """What the layers of a pass write, one layer after the other. `parts`: views of `qkv` and `attended`.

    Each row is a token. All are in one memory block. Attention and MLP use it in turn.
    """

    qkv: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    gated: torch.Tensor
    parts: list[_PartViews]


class Llama:
    """A decoder. `attention` holds its KV. `max_len`: length of the longest sequence in tokens. `gemv`: the products
    for small batches of decodes; None if the path "gemm" computes all of them. `products`: those of that path."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceWeights,
        ops: Ops,
        attention: Attention,
        *,
        max_len: int,
        gemv: Gemv | None = None,
        products: Products | None = None,
    ) -> None:
        self._weights = weights
        self._ops = ops
        self._products = products or Products(ops)
        self._attention = attention
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        angles = np.concatenate(rope_tables(config.ropes[0], max_len), axis=1)
        self._angles = torch.from_numpy(angles).to(weights.embedding.device)
        self._small_batch = SmallBatch(config, weights, gemv, attention, self._angles) if gemv is not None else None

    def logits(
        self,
        parts: Sequence[Part],
        last_token: torch.Tensor,
        out: torch.Tensor,
        *,
        decode_path: DecodePath = "gemm",
    ) -> None:
        """Compute a pass of one or more parts. Its tokens are those of the parts, one part after the other.

        Write the float32 logits of the sampled rows, in the same order, to `out` [sampled, vocab]. Attention is
        computed part by part. Everything else is computed once for all tokens, so the weights are read once.

        `decode_path`: only "gemm" for several parts, for chunks and for more than `small_batch.MAX_ROWS` decodes.
        `last_token`: int32[slots], for the ids that the host does not know. Nothing here waits for the device, so it
        can be captured in a graph.
        """
        residual = F.embedding(
            _joined([self._ids(part.inputs, last_token) for part in parts]), self._weights.embedding
        )
        if decode_path == "gemm":
            self._gemm_path(parts, residual, out)
        else:
            assert self._small_batch is not None
            [decodes] = parts
            self._small_batch.logits(decodes.inputs, residual, out, prefetch=decode_path == "gemv, prefetch")

    def _gemm_path(self, parts: Sequence[Part], residual: torch.Tensor, out: torch.Tensor) -> None:
        layers = self._weights.layers
        buffers = self._buffers(parts, residual)
        x = self._ops.rms_norm(residual, layers[0].attention_norm, self._eps)
        for i, layer in enumerate(layers):
            self._attend(i, layer, x, buffers)
            self._ops.add_rms_norm(x, residual, layer.mlp_norm, self._eps)
            self._products.apply(layer.gate_up, x, buffers.gate_up)
            self._ops.silu_mul(buffers.gate_up, buffers.gated)
            self._products.apply(layer.down, buffers.gated, x)
            if i + 1 < len(layers):
                self._ops.add_rms_norm(x, residual, layers[i + 1].attention_norm, self._eps)
        if not len(out):
            return
        if not all(part.decode for part in parts):
            sampled = _logits_indices(parts)
            x, residual = x.index_select(0, sampled), residual.index_select(0, sampled)
        self._ops.add_rms_norm(x, residual, self._weights.norm, self._eps)
        self._products.project(x, self._weights.head, out)

    def _ids(self, inputs: Inputs, last_token: torch.Tensor) -> torch.Tensor:
        """Return the ids to embed. If no token could be sampled, last_token is negative too. Then any id is fine: the
        request ends."""
        unknown = last_token.index_select(0, inputs.slots.index_select(0, inputs.rows))
        return torch.where(inputs.tokens < 0, unknown, inputs.tokens).clamp_(min=0)

    def _attend(self, index: int, layer: Layer, x: torch.Tensor, buffers: _Buffers) -> None:
        """Replace x [n, hidden] by the output of attention for it."""
        self._products.apply(layer.qkv, x, buffers.qkv)
        keys, values = self._attention.pages(index)
        for part, q, k, v, attended in buffers.parts:
            self._ops.append(q, k, v, keys, values, part.inputs, self._angles)
            self._attention.attend(index, q, part.inputs, attended, decode=part.decode)
        self._products.apply(layer.out, buffers.attended, x)

    def _buffers(self, parts: Sequence[Part], residual: torch.Tensor) -> _Buffers:
        """Return the buffers of a pass. Their views are made once here, and not in each layer: that takes time."""
        layer, rows = self._weights.layers[0], len(residual)
        (qkv, attended), (gate_up, gated) = _take_turns(
            residual,
            [(rows, len(layer.qkv.weight)), (rows, self._heads * self._head_dim)],
            [(rows, len(layer.gate_up.weight)), (rows, layer.down.weight.shape[1])],
        )
        counts = [len(part.inputs.tokens) for part in parts]
        slices = zip(
            parts,
            qkv.unflatten(-1, (-1, self._head_dim)).split(counts),
            attended.unflatten(-1, (-1, self._head_dim)).split(counts),
            strict=True,
        )
        views = []
        for part, tokens, into in slices:
            q, k, v = tokens.split([self._heads, self._kv_heads, self._kv_heads], 1)
            views.append(_PartViews(part, q, k, v, into))
        return _Buffers(qkv, attended, gate_up, gated, views)


def _take_turns(like: torch.Tensor, *groups: Sequence[tuple[int, int]]) -> list[list[torch.Tensor]]:
    """Return a tensor of each shape, with dtype and device of `like`. All groups are in the same memory."""
    sizes = [[-(-rows * columns // _ALIGNMENT) * _ALIGNMENT for rows, columns in group] for group in groups]
    memory = like.new_empty(max(map(sum, sizes)))
    return [
        [
            part[: rows * columns].view(rows, columns)
            for part, (rows, columns) in zip(memory[: sum(parts)].split(parts), group, strict=True)
        ]
        for parts, group in zip(sizes, groups, strict=True)
    ]


def _logits_indices(parts: Sequence[Part]) -> torch.Tensor:
    """Return the index in the pass of each token that gives logits."""
    indices, first = [], 0
    for part in parts:
        indices.append(part.inputs.logits_indices + first if first else part.inputs.logits_indices)
        first += len(part.inputs.tokens)
    return _joined(indices)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
