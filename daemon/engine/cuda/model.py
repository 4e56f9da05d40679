"""The Llama forward pass in torch, on any device, over `Ops` and `Attention`."""

from __future__ import annotations

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
        angles = np.concatenate(rope_tables(config, max_len), axis=1)
        self._angles = torch.from_numpy(angles).to(weights.embedding.device)
        self._small_batch = SmallBatch(config, weights, gemv, attention, self._angles) if gemv is not None else None

    def logits(
        self,
        inputs: Inputs,
        last_token: torch.Tensor,
        out: torch.Tensor,
        *,
        decode: bool,
        decode_path: DecodePath = "gemm",
    ) -> None:
        """Compute a pass, and write the float32 logits of its sampled rows to `out` [sampled, vocab].

        `decode`: every row is one token and is sampled. `decode_path`: for more than `small_batch.MAX_ROWS` decodes
        only "gemm". `last_token`: int32[slots], for the ids that the host does not know. Nothing here waits for the
        device, so it can be captured in a graph.
        """
        residual = F.embedding(self._ids(inputs, last_token), self._weights.embedding)
        if decode_path == "gemm":
            self._gemm_path(inputs, residual, out, decode)
        else:
            assert self._small_batch is not None
            self._small_batch.logits(inputs, residual, out, prefetch=decode_path == "gemv, prefetch")

    def _gemm_path(self, inputs: Inputs, residual: torch.Tensor, out: torch.Tensor, decode: bool) -> None:
        layers = self._weights.layers
        x = self._ops.rms_norm(residual, layers[0].attention_norm, self._eps)
        for i, layer in enumerate(layers):
            x = self._attend(i, layer, x, inputs, decode)
            self._ops.add_rms_norm(x, residual, layer.mlp_norm, self._eps)
            x = self._products.apply(layer.down, self._ops.silu_mul(self._products.apply(layer.gate_up, x)))
            if i + 1 < len(layers):
                self._ops.add_rms_norm(x, residual, layers[i + 1].attention_norm, self._eps)
        if not len(out):
            return
        if not decode:
            x, residual = x.index_select(0, inputs.logits_indices), residual.index_select(0, inputs.logits_indices)
        self._ops.add_rms_norm(x, residual, self._weights.norm, self._eps)
        self._products.project(x, self._weights.head, out)

    def _ids(self, inputs: Inputs, last_token: torch.Tensor) -> torch.Tensor:
        """Return the ids to embed. If no token could be sampled, last_token is negative too. Then any id is fine: the
        request ends."""
        unknown = last_token.index_select(0, inputs.slots.index_select(0, inputs.rows))
        return torch.where(inputs.tokens < 0, unknown, inputs.tokens).clamp_(min=0)

    def _attend(self, index: int, layer: Layer, x: torch.Tensor, inputs: Inputs, decode: bool) -> torch.Tensor:
        width, kv_width = self._heads * self._head_dim, self._kv_heads * self._head_dim
        parts = self._products.apply(layer.qkv, x).split([width, kv_width, kv_width], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in parts)
        self._ops.append(q, k, v, *self._attention.pages(index), inputs, self._angles)
        return self._products.apply(layer.out, self._attention.attend(index, q, inputs, decode=decode).flatten(1))
