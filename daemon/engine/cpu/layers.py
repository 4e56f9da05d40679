"""The weights of a decoder's layers, packed for the CPU, and the MLP of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from daemon.engine.cpu.experts import Experts
from daemon.engine.cpu.linear import Linear
from daemon.engine.cpu.ops import Ops, raw
from daemon.engine.weights import Weights
from daemon.models.architecture import LayerConfig, ModelConfig
from daemon.models.tensors import NORMS

Norm = npt.NDArray[np.float32]  # the weights of a norm


class Mlp(Protocol):
    """What a layer does after attention."""

    @property
    def linears(self) -> Sequence[Linear]:
        """One product of each shape, to run them before the first step."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the delta of the rows `x` [rows, hidden]."""
        ...


class Layer(NamedTuple):
    """Weights of one decoder layer. `qkv` computes query, key and value in one product. None: the layer has no such
    norm."""

    config: LayerConfig
    before_attention: Norm | None
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    after_attention: Norm | None
    before_mlp: Norm | None
    mlp: Mlp
    after_mlp: Norm | None


class DenseMlp:
    """An MLP of two products: `gate_up` computes gate and up in one. `activated`: [max tokens, width] to write."""

    def __init__(self, gate_up: Linear, down: Linear, activate: Callable[..., None], activated: torch.Tensor) -> None:
        self.linears = gate_up, down
        self._gate_up = gate_up
        self._down = down
        self._activate = activate
        self._activated = activated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._activated[: len(x)]
        self._activate(raw(self._gate_up(x)), raw(out))
        return self._down(out)


class LayerBuilder:
    """Builds layers from stored tensors, for steps of at most `max_tokens` tokens."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: Ops, dtype: torch.dtype, *, tiled: bool, max_tokens: int
    ) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops
        self._dtype = dtype
        self._tiled = tiled
        self._activate = ops.silu_mul if config.activation == "silu" else ops.gelu_tanh_mul
        self._activated = torch.zeros(max_tokens * config.mlp_width, dtype=dtype)  # all layers use it in turn

    def layer(self, index: int) -> Layer:
        config, at = self._config, f"model.layers.{index}"
        norms = [self.norm(f"{at}.{name}") if name else None for name in NORMS[config.norm_kind]]
        before_attention, after_attention, before_mlp, after_mlp = norms
        attention = f"{at}.self_attn"
        has_experts = config.layers[index].experts
        return Layer(
            config=config.layers[index],
            before_attention=before_attention,
            qkv=self._linear(*(f"{attention}.{x}_proj" for x in "qkv"), bias=config.qkv_bias),
            q_norm=self.norm(f"{attention}.q_norm") if config.qk_norm else None,
            k_norm=self.norm(f"{attention}.k_norm") if config.qk_norm else None,
            out=self._linear(f"{attention}.o_proj", bias=config.out_bias),
            after_attention=after_attention,
            before_mlp=before_mlp,
            mlp=self._experts(f"{at}.mlp") if has_experts else self._dense(f"{at}.mlp"),
            after_mlp=after_mlp,
        )

    def head(self, name: str) -> Linear:
        """Return the output layer. It is always float32: rounding to bfloat16 makes different logits equal."""
        return Linear(self._weights.get(f"{name}.weight").float(), tiled=self._tiled)

    def norm(self, name: str) -> Norm:
        # A copy: the kernels are compiled for writable arrays, and a mapped tensor may be unaligned.
        stored: Any = self._weights.get(f"{name}.weight").float().numpy()
        return np.array(stored + np.float32(self._config.norm_offset))

    def _dense(self, at: str) -> DenseMlp:
        return DenseMlp(*self._mlp_linears(at), self._activate, self._buffer(self._config.intermediate_size))

    def _experts(self, at: str) -> Experts:
        experts = self._config.experts
        assert experts is not None
        pairs = [self._mlp_linears(f"{at}.experts.{e}") for e in range(experts.count)]
        return Experts(
            experts,
            router=self._linear(f"{at}.gate"),
            gate_up=[gate_up for gate_up, _ in pairs],
            down=[down for _, down in pairs],
            activate=self._activate,
            add=self._ops.add_experts,
            activated=self._buffer(experts.width),
        )

    def _mlp_linears(self, at: str) -> tuple[Linear, Linear]:
        bias = self._config.mlp_bias
        gate_up = self._linear(f"{at}.gate_proj", f"{at}.up_proj", bias=bias)
        return gate_up, self._linear(f"{at}.down_proj", bias=bias)

    def _buffer(self, width: int) -> torch.Tensor:
        return self._activated[: len(self._activated) // width * width].view(-1, width)

    def _linear(self, *names: str, bias: bool = False) -> Linear:
        """Return the linear layers `names`, which have the same input, as one layer."""
        parts = [
            torch.cat([self._weights.get(f"{name}.{part}").to(self._dtype) for name in names])
            for part in (["weight", "bias"] if bias else ["weight"])
        ]
        return Linear(*parts, tiled=self._tiled)
