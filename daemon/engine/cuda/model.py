"""The forward pass of a decoder in torch, on any device, over `Ops` and `Attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from daemon.engine.cuda.arrays import Inputs
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.experts import Mixture
from daemon.engine.cuda.ops import HeadNorms, Ops
from daemon.engine.cuda.products import Products
from daemon.engine.cuda.scoring import PassScores
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
    """What the layers of a pass write, one after the other. `q`, `k` and `parts`: views of `qkv` and `attended`.

    Each row is a token. All are in one memory block. Attention and MLP use it in turn.
    """

    qkv: torch.Tensor
    q: torch.Tensor  # [n, heads * head_dim]
    k: torch.Tensor  # [n, kv_heads * head_dim]
    attended: torch.Tensor
    gate_up: torch.Tensor
    gated: torch.Tensor
    parts: list[_PartViews]


class Decoder:
    """A model. `attention` holds its KV. `max_len`: length of the longest sequence in tokens. `gemv`: the products
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
        self._config = config
        self._weights = weights
        self._ops = ops
        self._products = products or Products(ops)
        self._attention = attention
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._angles = self._angles_by_layer(max_len)
        self._head_norms = [self._head_norms_of(layer) for layer in weights.layers]
        self._mixture = Mixture(config.experts, ops) if config.experts else None
        # Rounded as the embeddings are: Gemma is trained so.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=weights.embedding.dtype))
        self._small_batch = (
            SmallBatch(config, weights, gemv, attention, self._angles[0]) if gemv is not None else None
        )

    def logits(
        self,
        parts: Sequence[Part],
        last_token: torch.Tensor,
        out: torch.Tensor,
        *,
        decode_path: DecodePath = "gemm",
        scores: PassScores | None = None,
    ) -> None:
        """Compute a pass of one or more parts. Its tokens are those of the parts, one part after the other.

        Write the float32 logits of the sampled rows, in the same order, to `out` [sampled, vocab]. Attention is
        computed part by part. Everything else is computed once for all tokens, so the weights are read once.

        `decode_path`: only "gemm" for several parts, for chunks and for more than `small_batch.MAX_ROWS` decodes.
        `last_token`: int32[slots], for the ids that the host does not know. Nothing here waits for the device, so it
        can be captured in a graph. `scores`: gets the logits of the tokens that it names; only on the path "gemm".
        """
        residual = F.embedding(
            _joined([self._ids(part.inputs, last_token) for part in parts]), self._weights.embedding
        )
        if self._embedding_scale != 1.0:
            residual.mul_(self._embedding_scale)
        if decode_path == "gemm":
            self._gemm_path(parts, residual, out, scores)
        else:
            assert self._small_batch is not None
            [decodes] = parts
            self._small_batch.logits(decodes.inputs, residual, out, prefetch=decode_path == "gemv, prefetch")
        self._scale_logits(out)

    def _gemm_path(
        self, parts: Sequence[Part], residual: torch.Tensor, out: torch.Tensor, scores: PassScores | None
    ) -> None:
        buffers = self._buffers(parts, residual)
        if self._config.norm_kind == "post":
            x = self._normalised_outputs(residual, buffers)
        else:
            x = self._normalised_inputs(residual, buffers)
        if scores is not None:
            self._score(x, residual, scores)
        if not len(out):
            return
        if not all(part.decode for part in parts):
            sampled = _logits_indices(parts)
            x, residual = x.index_select(0, sampled), residual.index_select(0, sampled)
        self._ops.add_rms_norm(x, residual, self._weights.norm, self._eps)
        self._products.project(x, self._weights.head, out)

    def _score(self, x: torch.Tensor, residual: torch.Tensor, scores: PassScores) -> None:
        """Compute the logits of the scored tokens, some at a time. `x`: what is still to be added to `residual`."""
        logits = residual.new_empty(scores.step, self._config.vocab_size, dtype=torch.float32)
        for first in range(0, len(scores.indices), scores.step):
            rows = scores.indices[first : first + scores.step]
            into = logits[: len(rows)]
            normed = x.index_select(0, rows)
            self._ops.add_rms_norm(normed, residual.index_select(0, rows), self._weights.norm, self._eps)
            self._products.project(normed, self._weights.head, into)
            self._scale_logits(into)
            scores.add(first, into)

    def _normalised_inputs(self, residual: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
        """Compute all layers of a model with the `norm_kind` "pre" or "sandwich".

        Update the residual stream [n, hidden], and return what is still to be added to it.
        """
        layers = self._weights.layers
        x = self._ops.rms_norm(residual, _given(layers[0].attention_norm), self._eps)
        for i, layer in enumerate(layers):
            self._attend(i, layer, x, x, buffers)
            self._ops.add_rms_norm(x, residual, _given(layer.mlp_norm), self._eps)
            self._mlp(layer, x, x, buffers)
            if i + 1 < len(layers):
                self._ops.add_rms_norm(x, residual, _given(layers[i + 1].attention_norm), self._eps)
        return x

    def _normalised_outputs(self, residual: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
        """Compute all layers of a model with the `norm_kind` "post". See `_normalised_inputs`."""
        x = torch.empty_like(residual)
        for i, layer in enumerate(self._weights.layers):
            if i:
                residual.add_(x)
            self._attend(i, layer, residual, x, buffers)
            residual.add_(x)
            self._mlp(layer, residual, x, buffers)
        return x

    def _scale_logits(self, logits: torch.Tensor) -> None:
        divisor, cap = self._config.logits_divisor, self._config.logits_softcap
        if cap:
            logits.mul_(1.0 / (divisor * cap)).tanh_().mul_(cap)
        elif divisor != 1.0:
            logits.mul_(1.0 / divisor)

    def _ids(self, inputs: Inputs, last_token: torch.Tensor) -> torch.Tensor:
        """Return the ids to embed. If no token could be sampled, last_token is negative too. Then any id is fine: the
        request ends."""
        unknown = last_token.index_select(0, inputs.slots.index_select(0, inputs.rows))
        return torch.where(inputs.tokens < 0, unknown, inputs.tokens).clamp_(min=0)

    def _attend(self, index: int, layer: Layer, x: torch.Tensor, out: torch.Tensor, buffers: _Buffers) -> None:
        """Write the output of attention for x [n, hidden] to `out`, which may be x."""
        self._products.apply(layer.qkv, x, buffers.qkv)
        if self._config.qk_norm == "row":
            self._ops.rms_norm(buffers.q, _given(layer.q_norm), self._eps, out=buffers.q)
            self._ops.rms_norm(buffers.k, _given(layer.k_norm), self._eps, out=buffers.k)
        keys, values = self._attention.pages(index)
        angles, norms = self._angles[index], self._head_norms[index]
        for part, q, k, v, attended in buffers.parts:
            self._ops.append(q, k, v, keys, values, part.inputs, angles, norms)
            self._attention.attend(index, q, part.inputs, attended, decode=part.decode)
        self._products.apply(layer.out, buffers.attended, out)
        self._finish(out, layer.after_attention)

    def _mlp(self, layer: Layer, x: torch.Tensor, out: torch.Tensor, buffers: _Buffers) -> None:
        """Write the output of the MLP for x [n, hidden] to `out`, which may be x."""
        if layer.experts is not None:
            assert self._mixture is not None
            self._mixture.apply(layer.experts, x, out)
        else:
            assert layer.gate_up is not None and layer.down is not None
            self._products.apply(layer.gate_up, x, buffers.gate_up)
            if self._config.activation == "silu":
                self._ops.silu_mul(buffers.gate_up, buffers.gated)
            else:
                self._ops.gelu_tanh_mul(buffers.gate_up, buffers.gated)
            self._products.apply(layer.down, buffers.gated, out)
        self._finish(out, layer.after_mlp)

    def _finish(self, x: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Normalise and scale, in place, what is added to the residual stream."""
        if norm is not None:
            self._ops.rms_norm(x, norm, self._eps, out=x)
        if self._config.residual_scale != 1.0:
            x.mul_(self._config.residual_scale)

    def _angles_by_layer(self, max_len: int) -> list[torch.Tensor]:
        """Return float32[max_len, rotary_dim] of each layer; layers with the same rope share it."""
        device = self._weights.embedding.device
        tables = [
            torch.from_numpy(np.concatenate(rope_tables(rope, max_len), axis=1)).to(device)
            for rope in self._config.ropes
        ]
        return [tables[layer.rope] for layer in self._config.layers]

    def _head_norms_of(self, layer: Layer) -> HeadNorms | None:
        if self._config.qk_norm != "head":
            return None
        return HeadNorms(_given(layer.q_norm), _given(layer.k_norm), self._eps)

    def _buffers(self, parts: Sequence[Part], residual: torch.Tensor) -> _Buffers:
        """Return the buffers of a pass. Their views are made once here, and not in each layer: that takes time."""
        rows, q_width, k_width = len(residual), self._heads * self._head_dim, self._kv_heads * self._head_dim
        dense = any(layer.gate_up is not None for layer in self._weights.layers)
        width = self._config.intermediate_size if dense else 0
        (qkv, attended), (gate_up, gated) = _take_turns(
            residual, [(rows, q_width + 2 * k_width), (rows, q_width)], [(rows, 2 * width), (rows, width)]
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
        q_rows, k_rows, _ = qkv.split([q_width, k_width, k_width], 1)
        return _Buffers(qkv, q_rows, k_rows, attended, gate_up, gated, views)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor that the model's `norm_kind` or `qk_norm` says is there."""
    assert tensor is not None
    return tensor


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
