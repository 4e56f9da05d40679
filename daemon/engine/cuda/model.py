"""The Llama forward pass in torch: on any device, over `Ops` and `Attention`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from daemon.engine.cuda.arrays import Inputs
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.ops import Ops
from daemon.engine.cuda.small_batch import FewRows, Gemv, Way
from daemon.engine.cuda.weights import DeviceWeights, Layer, Linear
from daemon.engine.rope import rope_tables
from daemon.models.model_config import ModelConfig


class Llama:
    """A decoder; its KV is where `attention` keeps it. `max_len`: longest sequence in tokens. `gemv`: for decodes of
    few rows; None if all are computed as any pass."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceWeights,
        ops: Ops,
        attention: Attention,
        *,
        max_len: int,
        gemv: Gemv | None = None,
    ) -> None:
        self._weights = weights
        self._ops = ops
        self._attention = attention
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        angles = np.concatenate(rope_tables(config, max_len), axis=1)
        self._angles = torch.from_numpy(angles).to(weights.embedding.device)
        self._few = FewRows(config, weights, gemv, attention, self._angles) if gemv is not None else None

    def logits(
        self, inputs: Inputs, last_token: torch.Tensor, out: torch.Tensor, *, decode: bool, way: Way = "all rows"
    ) -> None:
        """Compute a pass and write the float32 logits of its sampled rows to `out` [sampled, vocab].

        `decode`: every row is one token and sampled. `way`: of decodes; only "all rows" for more than
        `few_rows.MOST_ROWS`. `last_token`: int32[slots], for the ids unknown to the host. Nothing in here waits for
        the device: it can be captured in a graph.
        """
        residual = F.embedding(self._ids(inputs, last_token), self._weights.embedding)
        if way == "all rows":
            self._all_rows(inputs, residual, out, decode)
        else:
            assert self._few is not None
            self._few.logits(inputs, residual, out, ahead=way == "few rows, ahead")

    def _all_rows(self, inputs: Inputs, residual: torch.Tensor, out: torch.Tensor, decode: bool) -> None:
        layers = self._weights.layers
        x = self._ops.rms_norm(residual, layers[0].attention_norm, self._eps)
        for i, layer in enumerate(layers):
            x = self._attend(i, layer, x, inputs, decode)
            self._ops.add_rms_norm(x, residual, layer.mlp_norm, self._eps)
            x = _apply(layer.down, self._ops.silu_mul(_apply(layer.gate_up, x)))
            if i + 1 < len(layers):
                self._ops.add_rms_norm(x, residual, layers[i + 1].attention_norm, self._eps)
        if not len(out):
            return
        if not decode:
            x, residual = x.index_select(0, inputs.ends), residual.index_select(0, inputs.ends)
        self._ops.add_rms_norm(x, residual, self._weights.norm, self._eps)
        self._ops.project(x, self._weights.head, out)

    def _ids(self, inputs: Inputs, last_token: torch.Tensor) -> torch.Tensor:
        """Ids to embed. Where nothing could be drawn last_token is negative too: any id will do, the request ends."""
        unknown = last_token.index_select(0, inputs.slots.index_select(0, inputs.rows))
        return torch.where(inputs.tokens < 0, unknown, inputs.tokens).clamp_(min=0)

    def _attend(self, index: int, layer: Layer, x: torch.Tensor, inputs: Inputs, decode: bool) -> torch.Tensor:
        width, kv_width = self._heads * self._head_dim, self._kv_heads * self._head_dim
        parts = _apply(layer.qkv, x).split([width, kv_width, kv_width], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in parts)
        self._ops.append(q, k, v, *self._attention.pages(index), inputs, self._angles)
        return _apply(layer.out, self._attention.attend(index, q, inputs, decode=decode).flatten(1))


def _apply(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)
