"""The model's tensors on the device, in the shapes that the forward pass uses."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from daemon.engine.cuda.fp8 import E4M3, MULTIPLE
from daemon.engine.weights import CheckpointWeights, DummyWeights, Fp8Matrix, Weights
from daemon.models.model_config import ModelConfig
from daemon.models.tensors import NORMS, expected_tensors


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] or None. `transposed`: the weight as a view [in, out].

    `scales`: factors of the rows of an e4m3 weight, float32[1, out]; None for other weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    transposed: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None) -> Linear:
        return cls(weight, bias, weight.t(), scales)


class Experts(NamedTuple):
    """The mixture of experts of a layer. Gate and up of an expert are one product."""

    router: torch.Tensor  # [experts, hidden]
    gate_up: torch.Tensor  # [experts, 2 * width, hidden]
    down: torch.Tensor  # [experts, hidden, width]


class Layer(NamedTuple):
    """One decoder layer. Query, key and value are one product, gate and up another one.

    It has the norms of the model's `norm_kind` and `qk_norm`, and either experts, or gate_up and down.
    """

    attention_norm: torch.Tensor | None
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor | None
    gate_up: Linear | None
    down: Linear | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    after_attention: torch.Tensor | None = None
    after_mlp: torch.Tensor | None = None
    experts: Experts | None = None


class DeviceWeights(NamedTuple):
    """All tensors of a model."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor  # [vocab, hidden]; the embedding itself if they are tied

    @property
    def in_fp8(self) -> bool:
        """True if linear layers have e4m3 weights."""
        linears = (linear for layer in self.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down))
        return any(linear is not None and linear.scales is not None for linear in linears)


class DeviceDummy:
    """Random weights made on the device, which takes about a second for 8 billion.

    They depend on the tensor's name only, so all engines with the same kind of device have the same weights.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = expected_tensors(config)
        self._norm = 1.0 - config.norm_offset
        self._device = device
        self._dtype = dtype

    def get(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.full(shape, self._norm, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.uniform_(-0.03, 0.03, generator=generator)

    def fp8(self, name: str) -> None:
        return None


def load_weights(
    config: ModelConfig,
    load_format: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    keep_fp8: bool = False,
) -> DeviceWeights:
    """Read or make all weights. Raises ModelError for an incomplete checkpoint.

    `head_dim`: width of the heads on the device; if it is more than the model's, the other elements are zeros.
    `keep_fp8`: FP8 matrices of linear layers that have a factor for each row or for all are not dequantised.
    """
    load = _Loader(config, _source(config, load_format, device, dtype), device, dtype, head_dim, keep_fp8=keep_fp8)
    embedding = load.tensor("model.embed_tokens.weight")
    return DeviceWeights(
        embedding=embedding,
        layers=[load.layer(i) for i in range(config.num_layers)],
        norm=load.tensor("model.norm.weight"),
        head=embedding if config.tie_embeddings else load.tensor("lm_head.weight"),
    )


def _source(config: ModelConfig, load_format: str, device: torch.device, dtype: torch.dtype) -> Weights:
    if load_format != "dummy":
        return CheckpointWeights(config)
    return DummyWeights(config) if device.type == "cpu" else DeviceDummy(config, device, dtype)


class _Loader:
    """Puts the tensors of `source` together on the device. Each one is freed before the next one is read."""

    def __init__(
        self,
        config: ModelConfig,
        source: Weights,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        keep_fp8: bool,
    ) -> None:
        self._config = config
        self._keep_fp8 = keep_fp8
        self._head_dim = head_dim
        self._source = source
        self._shapes = expected_tensors(config)
        self._device = device
        self._dtype = dtype

    def tensor(self, *names: str) -> torch.Tensor:
        """Return the tensors `names`, concatenated by rows."""
        if len(names) == 1:
            return self._source.get(names[0]).to(device=self._device, dtype=self._dtype)
        shapes = [self._shapes[name] for name in names]
        out = self._empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        for name, part in zip(names, out.split([shape[0] for shape in shapes]), strict=True):
            part.copy_(self._source.get(name))
        return out

    def layer(self, index: int) -> Layer:
        at, config, names = f"model.layers.{index}", self._config, NORMS[self._config.norm_kind]
        attention = f"{at}.self_attn"
        layer = Layer(
            attention_norm=self._optional(at, names.before_attention),
            qkv=self._wide_rows(self._linear(attention, "q_proj", "k_proj", "v_proj", bias=config.qkv_bias)),
            out=self._wide_columns(self._linear(attention, "o_proj", bias=config.out_bias)),
            mlp_norm=self._optional(at, names.before_mlp),
            gate_up=None,
            down=None,
            q_norm=self._optional(attention, "q_norm" if config.qk_norm else ""),
            k_norm=self._optional(attention, "k_norm" if config.qk_norm else ""),
            after_attention=self._optional(at, names.after_attention),
            after_mlp=self._optional(at, names.after_mlp),
        )
        if config.layers[index].experts:
            return layer._replace(experts=self._experts(f"{at}.mlp"))
        return layer._replace(
            gate_up=self._linear(f"{at}.mlp", "gate_proj", "up_proj", bias=config.mlp_bias),
            down=self._linear(f"{at}.mlp", "down_proj", bias=config.mlp_bias),
        )

    def _optional(self, at: str, name: str) -> torch.Tensor | None:
        return self.tensor(f"{at}.{name}.weight") if name else None

    def _linear(self, at: str, *names: str, bias: bool) -> Linear:
        weights = [f"{at}.{name}.weight" for name in names]
        biases = self.tensor(*(f"{at}.{name}.bias" for name in names)) if bias else None
        if self._keep_fp8 and (kept := self._fp8(weights)) is not None:
            values, scales = kept
            return Linear.of(values, biases, scales.unsqueeze(0))
        return Linear.of(self.tensor(*weights), biases)

    def _fp8(self, names: Sequence[str]) -> Fp8Matrix | None:
        """Return matrices as one, on the device; None if they are not all FP8 that the device multiplies."""
        parts = [part for part in map(self._source.fp8, names) if part is not None]
        narrow = self._head_dim != self._config.head_dim and ".self_attn." in names[0]  # gets zeros, as bf16
        if narrow or len(parts) < len(names) or any(n % MULTIPLE for part in parts for n in part.values.shape):
            return None
        rows = [len(part.values) for part in parts]
        values = torch.empty(sum(rows), parts[0].values.shape[1], dtype=E4M3, device=self._device)
        for into, part in zip(values.split(rows), parts, strict=True):
            into.copy_(part.values)
        return Fp8Matrix(values, torch.cat([part.scales for part in parts]).to(self._device))

    def _wide_rows(self, linear: Linear) -> Linear:
        """Return a linear layer that gives heads, with zeros up to their width on the device."""
        if self._head_dim == self._config.head_dim:
            return linear
        return Linear.of(self._widened(linear.weight), None if linear.bias is None else self._widened(linear.bias))

    def _wide_columns(self, linear: Linear) -> Linear:
        """The same for a linear layer that takes heads."""
        if self._head_dim == self._config.head_dim:
            return linear
        return Linear.of(self._widened(linear.transposed).t().contiguous(), linear.bias)

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(0, (-1, self._config.head_dim))
        out = rows.new_zeros(len(heads), self._head_dim, *rows.shape[1:])
        out[:, : self._config.head_dim] = heads
        return out.flatten(0, 1)

    def _experts(self, at: str) -> Experts:
        """Fill the stacked weights expert by expert, so that no second copy of a layer is in memory."""
        assert self._config.experts is not None
        count, width = self._config.experts.count, self._config.experts.width
        hidden = self._config.hidden_size
        gate_up, down = self._empty(count, 2, width, hidden), self._empty(count, hidden, width)
        for e in range(count):
            gate_up[e, 0].copy_(self._source.get(f"{at}.experts.{e}.gate_proj.weight"))
            gate_up[e, 1].copy_(self._source.get(f"{at}.experts.{e}.up_proj.weight"))
            down[e].copy_(self._source.get(f"{at}.experts.{e}.down_proj.weight"))
        return Experts(self.tensor(f"{at}.gate.weight"), gate_up.flatten(1, 2), down)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
