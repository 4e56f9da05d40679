"""Llama forward pass on the CPU: oneDNN computes the linear layers, compiled kernels compute the rest.

The residual stream is float32 and starts at zero. The embedding, and then the output of each attention and MLP, is a
*delta* that the next normalisation adds to the residual. Deltas and normalised rows have the dtype of `arithmetic`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from daemon.engine.cpu.attention import Attention, AttentionShape, compile_attention
from daemon.engine.cpu.batch import Batch, Ints
from daemon.engine.cpu.linear import DTYPES, Arithmetic, Linear
from daemon.engine.cpu.ops import Ops, compile_ops
from daemon.engine.rope import rope_tables
from daemon.engine.weights import Weights
from daemon.models.model_config import ModelConfig


class Layer(NamedTuple):
    """Weights of one decoder layer. `qkv` computes query, key and value in one product, `gate_up` gate and up."""

    attention_norm: npt.NDArray[np.float32]
    qkv: Linear
    out: Linear
    mlp_norm: npt.NDArray[np.float32]
    gate_up: Linear
    down: Linear


class Llama:
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
        self._shape = shape
        self._pool = pool
        self._dtype = DTYPES[arithmetic]
        self._eps = np.float32(config.rms_norm_eps)
        self._scale = np.float32(shape.query_scale)
        self._cos, self._sin = rope_tables(config.ropes[0], max_len)
        build = _Builder(weights, self._dtype, deterministic)
        self._embedding = weights.get("model.embed_tokens.weight")
        self._layers = [build.layer(config, i) for i in range(config.num_layers)]
        self._norm_weight = build.norm("model.norm")
        self._head = build.head("model.embed_tokens" if config.tie_embeddings else "lm_head")
        self._ops: Ops = compile_ops(threads > 1)
        self._attention: Attention = compile_attention(shape, threads > 1)
        attention_width = config.num_heads * config.head_dim
        self._residual = np.zeros((max_tokens, config.hidden_size), np.float32)
        self._queries = np.empty((max_tokens, attention_width), np.float32)
        self._normed = torch.zeros(max_tokens, config.hidden_size, dtype=self._dtype)
        self._final = torch.zeros(max_tokens, config.hidden_size)
        self._attended = torch.zeros(max_tokens, attention_width, dtype=self._dtype)
        self._activated = torch.zeros(max_tokens, config.intermediate_size, dtype=self._dtype)
        self._all_rows = np.arange(max_tokens, dtype=np.int32)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Write the batch's keys and values to the pool; return float32 logits [len(batch.sampled), vocab]."""
        count = len(batch.tokens)
        all_rows = self._all_rows[:count]
        self._residual[:count] = 0.0
        delta = F.embedding(torch.from_numpy(batch.tokens), self._embedding).to(self._dtype)
        for i, layer in enumerate(self._layers):
            x = self._add_norm(delta, layer.attention_norm, all_rows, self._normed)
            delta = self._attend(layer, i, x, batch)
            delta = self._mlp(layer, self._add_norm(delta, layer.mlp_norm, all_rows, self._normed))
        if not len(batch.sampled):
            return torch.empty(0, self._head.out_features)
        return self._head(self._add_norm(delta, self._norm_weight, batch.sampled, self._final))

    def warm_up(self, rows: int) -> None:
        """Run products of 1 to `rows` rows: oneDNN creates a kernel at the first one of each shape, in about 1 ms."""
        layer = self._layers[0]
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down, self._head):
            dtype = torch.float32 if linear is self._head else self._dtype
            for count in range(1, rows + 1):
                linear(torch.zeros(count, linear.in_features, dtype=dtype))

    def _add_norm(
        self, delta: torch.Tensor, weight: npt.NDArray[np.float32], rows: Ints, into: torch.Tensor
    ) -> torch.Tensor:
        out = into[: len(rows)]
        self._ops.add_rms_norm(self._residual, _raw(delta), rows, weight, self._eps, _raw(out))
        return out

    def _attend(self, layer: Layer, index: int, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        shape, pool = self._shape, self._pool
        layer_offset = index * shape.layer_width
        queries = self._queries[: len(x)]
        out = self._attended[: len(x)]
        self._ops.rope_and_store(
            _raw(layer.qkv(x)),
            batch.positions,
            batch.slots,
            self._cos,
            self._sin,
            self._scale,
            layer_offset,
            shape.value_offset,
            shape.token_width,
            queries,
            pool,
        )
        if batch.num_single:
            self._attention.attend_tokens(
                queries,
                pool,
                layer_offset,
                batch.positions[: batch.num_single],
                batch.tables,
                batch.blocks,
                _raw(out),
            )
        if len(batch.tiles):
            self._attention.attend_tiles(
                queries, pool, layer_offset, batch.positions, batch.tables, batch.blocks, batch.tiles, _raw(out)
            )
        return layer.out(out)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        out = self._activated[: len(x)]
        self._ops.silu_mul(_raw(layer.gate_up(x)), _raw(out))
        return layer.down(out)


class _Builder:
    """Builds layers from stored tensors."""

    def __init__(self, weights: Weights, dtype: torch.dtype, tiled: bool) -> None:
        self._weights = weights
        self._dtype = dtype
        self._tiled = tiled

    def layer(self, config: ModelConfig, index: int) -> Layer:
        at = f"model.layers.{index}"
        mlp = config.mlp_bias
        return Layer(
            attention_norm=self.norm(f"{at}.input_layernorm"),
            qkv=self.linear(*(f"{at}.self_attn.{x}_proj" for x in "qkv"), bias=config.qkv_bias),
            out=self.linear(f"{at}.self_attn.o_proj", bias=config.out_bias),
            mlp_norm=self.norm(f"{at}.post_attention_layernorm"),
            gate_up=self.linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", bias=mlp),
            down=self.linear(f"{at}.mlp.down_proj", bias=mlp),
        )

    def head(self, name: str) -> Linear:
        """Return the output layer. It is always float32: rounding to bfloat16 makes different logits equal."""
        return Linear(self._weights.get(f"{name}.weight").float(), tiled=self._tiled)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """Return the linear layers `names`, which have the same input, as one layer."""
        parts = [
            torch.cat([self._weights.get(f"{name}.{part}").to(self._dtype) for name in names])
            for part in (["weight", "bias"] if bias else ["weight"])
        ]
        return Linear(*parts, tiled=self._tiled)

    def norm(self, name: str) -> npt.NDArray[np.float32]:
        # A copy: the kernels are compiled for writable arrays, and a mapped tensor may be unaligned.
        return np.array(self._weights.get(f"{name}.weight").float().numpy())


def _raw(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the tensor as an array for the kernels: float32, or bfloat16 as uint16 bits. Shares memory."""
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
