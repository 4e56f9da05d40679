"""The model's tensors on the device, in the shapes that the forward pass uses."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from daemon.engine.weights import CheckpointWeights, DummyWeights, Weights
from daemon.models.model_config import ModelConfig
from daemon.models.tensors import expected_tensors


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] or None. `transposed`: the weight as a view [in, out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    transposed: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return cls(weight, bias, weight.t())


class Layer(NamedTuple):
    """One decoder layer. Query, key and value are one product, gate and up another one."""

    attention_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class DeviceWeights(NamedTuple):
    """All tensors of a model."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor  # [vocab, hidden]; the embedding itself if they are tied


class DeviceDummy:
    """Random weights made on the device, which takes about a second for 8 billion.

    They depend on the tensor's name only, so all engines with the same kind of device have the same weights.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = expected_tensors(config)
        self._device = device
        self._dtype = dtype

    def get(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.uniform_(-0.03, 0.03, generator=generator)


def load_weights(config: ModelConfig, load_format: str, device: torch.device, dtype: torch.dtype) -> DeviceWeights:
    """Read or make all weights. Raises ModelError for an incomplete checkpoint."""
    return _fuse(config, _source(config, load_format, device, dtype), device, dtype)


def _source(config: ModelConfig, load_format: str, device: torch.device, dtype: torch.dtype) -> Weights:
    if load_format != "dummy":
        return CheckpointWeights(config)
    return DummyWeights(config) if device.type == "cpu" else DeviceDummy(config, device, dtype)


def _fuse(config: ModelConfig, source: Weights, device: torch.device, dtype: torch.dtype) -> DeviceWeights:
    def tensor(*names: str) -> torch.Tensor:
        """Return the tensors `names`, concatenated by rows. Each one is freed before the next one is read."""
        if len(names) == 1:
            return source.get(names[0]).to(device=device, dtype=dtype)
        shapes = [shape_of(name) for name in names]
        out = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=dtype, device=device)
        for name, part in zip(names, out.split([shape[0] for shape in shapes]), strict=True):
            part.copy_(source.get(name))
        return out

    shape_of: Callable[[str], tuple[int, ...]] = expected_tensors(config).__getitem__

    def linear(at: str, *names: str, bias: bool) -> Linear:
        return Linear.of(
            tensor(*(f"{at}.{name}.weight" for name in names)),
            tensor(*(f"{at}.{name}.bias" for name in names)) if bias else None,
        )

    def layer(at: str) -> Layer:
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        return Layer(
            attention_norm=tensor(f"{at}.input_layernorm.weight"),
            qkv=linear(attention, "q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
            out=linear(attention, "o_proj", bias=config.out_bias),
            mlp_norm=tensor(f"{at}.post_attention_layernorm.weight"),
            gate_up=linear(mlp, "gate_proj", "up_proj", bias=config.mlp_bias),
            down=linear(mlp, "down_proj", bias=config.mlp_bias),
        )

    embedding = tensor("model.embed_tokens.weight")
    return DeviceWeights(
        embedding=embedding,
        layers=[layer(f"model.layers.{i}") for i in range(config.num_layers)],
        norm=tensor("model.norm.weight"),
        head=embedding if config.tie_embeddings else tensor("lm_head.weight"),
    )
