"""The forward pass of a decoder on the CPU: oneDNN computes the linear layers, compiled kernels compute the rest.

The residual stream is float32 and starts at zero. The embedding, and then the output of each attention and MLP, is a
*delta* that the next normalisation adds to the residual. Deltas and normalised rows have the dtype of `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from daemon.engine.cpu.attention import LOG2E, Attention, AttentionShape, compile_attention
from daemon.engine.cpu.batch import Batch, Ints
from daemon.engine.cpu.layers import Layer, LayerBuilder, Norm
from daemon.engine.cpu.linear import DTYPES, Arithmetic
from daemon.engine.cpu.ops import Ops, compile_ops, raw
from daemon.engine.prompt_scores import slice_rows
from daemon.engine.rope import rope_tables
from daemon.engine.weights import Weights
from daemon.models.model_config import ModelConfig

Score = Callable[[int, torch.Tensor], None]
"""Takes the index of the first of some scored tokens, and their logits."""


class Decoder:
    """A decoder over one KV pool. `logits` computes a step of at most `max_tokens` tokens.

    `pool` is flat: float32, or the bits of bf16 as uint16. `max_len` is the longest sequence in tokens.
    `deterministic` makes every row's result independent of its batch, bit for bit.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        shape: AttentionShape,
        pool: npt.NDArray[Any],
        *,
        arithmetic: Arithmetic,
        deterministic: bool,
        threads: int,
        max_tokens: int,
        max_len: int,
    ) -> None:
        self._config = config
        self._shape = shape
        self._pool = pool
        self._dtype = DTYPES[arithmetic]
        self._eps = np.float32(config.rms_norm_eps)
        self._query_scale = np.float32(config.query_scale * LOG2E)
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self._dtype)
        self._ropes = [rope_tables(rope, max_len) for rope in config.ropes]
        self._ops: Ops = compile_ops(threads > 1)
        build = LayerBuilder(config, weights, self._ops, self._dtype, tiled=deterministic, max_tokens=max_tokens)
        self._embedding = weights.get("model.embed_tokens.weight")
        self._layers = [build.layer(i) for i in range(config.num_layers)]
        self._norm_weight = build.norm("model.norm")
        self._head = build.head("model.embed_tokens" if config.tie_embeddings else "lm_head")
        self._attention: dict[bool, Attention] = {
            windowed: compile_attention(shape, threads > 1, windowed=windowed, softcap=config.attention_softcap)
            for windowed in {layer.window > 0 for layer in config.layers}
        }
        attention_width = config.num_heads * config.head_dim
        self._residual = np.zeros((max_tokens, config.hidden_size), np.float32)
        self._queries = np.empty((max_tokens, attention_width), np.float32)
        self._normed = torch.zeros(max_tokens, config.hidden_size, dtype=self._dtype)
        self._final = torch.zeros(max_tokens, config.hidden_size)
        self._attended = torch.zeros(max_tokens, attention_width, dtype=self._dtype)
        self._all_rows = np.arange(max_tokens, dtype=np.int32)
        self._slice_rows = slice_rows(config.vocab_size)

    def logits(self, batch: Batch, score: Score | None = None) -> torch.Tensor:
        """Write the batch's keys and values to the pool; return float32 logits [len(batch.sampled), vocab].

        `score` gets the logits of `batch.scored`, some at a time.
        """
        count = len(batch.tokens)
        all_rows = self._all_rows[:count]
        self._residual[:count] = 0.0
        delta = F.embedding(torch.from_numpy(batch.tokens), self._embedding).to(self._dtype)
        if self._config.embedding_scale != 1.0:
            delta = delta * self._embedding_scale
        for i, layer in enumerate(self._layers):
            x = self._add_norm(delta, layer.before_attention, all_rows, self._normed)
            delta = self._finished(self._attend(layer, i, x, batch), layer.after_attention)
            x = self._add_norm(delta, layer.before_mlp, all_rows, self._normed)
            delta = self._finished(layer.mlp(x), layer.after_mlp)
        if score is not None:
            for first in range(0, len(batch.scored), self._slice_rows):
                score(first, self._logits_of(delta, batch.scored[first : first + self._slice_rows]))
        if not len(batch.sampled):
            return torch.empty(0, self._head.out_features)
        return self._logits_of(delta, batch.sampled)

    def _logits_of(self, delta: torch.Tensor, rows: Ints) -> torch.Tensor:
        """Add the last delta to the residual stream of the `rows`, once for each, and return their logits."""
        return self._scaled(self._head(self._add_norm(delta, self._norm_weight, rows, self._final)))

    def warm_up(self, rows: int) -> None:
        """Run products of 1 to `rows` rows: oneDNN creates a kernel at the first one of each shape, in about 1 ms."""
        layer = self._layers[0]
        mlps = {type(layer.mlp): layer.mlp.linears for layer in self._layers}
        for linear in (layer.qkv, layer.out, *(x for linears in mlps.values() for x in linears), self._head):
            dtype = torch.float32 if linear is self._head else self._dtype
            for count in range(1, rows + 1):
                linear(torch.zeros(count, linear.in_features, dtype=dtype))

    def _add_norm(self, delta: torch.Tensor, norm: Norm | None, rows: Ints, into: torch.Tensor) -> torch.Tensor:
        """Add the delta to the residual stream; return the rows of the stream, normalised if there is a norm."""
        out = into[: len(rows)]
        if norm is None:
            self._ops.add_rows(self._residual, raw(delta), rows, raw(out))
        else:
            self._ops.add_rms_norm(self._residual, raw(delta), rows, norm, self._eps, raw(out))
        return out

    def _finished(self, delta: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """Return the output of attention or MLP as the delta to add, in place."""
        if norm is not None:
            self._ops.norm_groups(raw(delta), 0, 1, norm, self._eps)
        return delta.mul_(self._config.residual_scale) if self._config.residual_scale != 1.0 else delta

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        config = self._config
        if config.logits_divisor != 1.0:
            logits.div_(config.logits_divisor)
        if config.logits_softcap:
            logits.div_(config.logits_softcap).tanh_().mul_(config.logits_softcap)
        return logits

    def _attend(self, layer: Layer, index: int, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        layer_offset, window = index * self._shape.layer_width, layer.config.window
        attention, pool = self._attention[window > 0], self._pool
        queries = self._queries[: len(x)]
        out = self._attended[: len(x)]
        self._project(layer, layer_offset, x, batch, queries)
        if batch.num_single:
            attention.attend_tokens(
                queries,
                pool,
                layer_offset,
                window,
                batch.positions[: batch.num_single],
                batch.tables,
                batch.blocks,
                raw(out),
            )
        if len(batch.tiles):
            attention.attend_tiles(
                queries,
                pool,
                layer_offset,
                window,
                batch.positions,
                batch.tables,
                batch.blocks,
                batch.tiles,
                raw(out),
            )
        return layer.out(out)

    def _project(
        self, layer: Layer, layer_offset: int, x: torch.Tensor, batch: Batch, queries: npt.NDArray[np.float32]
    ) -> None:
        """Write the rotated queries of `x` to `queries`, and its rotated keys and its values to the pool."""
        qkv = raw(layer.qkv(x))
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(qkv, layer.q_norm, layer.k_norm)
        self._ops.rope_and_store(
            qkv,
            batch.positions,
            batch.slots,
            *self._ropes[layer.config.rope],
            self._shape.head_dim,
            self._query_scale,
            layer_offset,
            self._shape.value_offset,
            self._shape.token_width,
            queries,
            self._pool,
        )

    def _norm_heads(self, qkv: npt.NDArray[Any], q_norm: Norm, k_norm: Norm) -> None:
        """Normalise queries and keys in place: groups of columns as long as the norms."""
        q_width = self._shape.heads * self._shape.head_dim
        self._ops.norm_groups(qkv, 0, q_width // len(q_norm), q_norm, self._eps)
        self._ops.norm_groups(qkv, q_width, self._shape.token_width // len(k_norm), k_norm, self._eps)
