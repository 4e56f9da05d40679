"""What a model computes, as plain data: the decoder that all engines implement, and how families differ.

`daemon.models.families` fills it in, one file a family. No torch and no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Activation = Literal["silu", "gelu_tanh"]
NormKind = Literal["pre", "sandwich", "post"]
QkNorm = Literal["", "head", "row"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """A rotary embedding. It rotates the first `rotary_dim` elements of each head; the others stay.

    `original_length`: tokens of the context before scaling. `attention_factor` multiplies cosines and sines.
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_length: int = 0  # all but default and linear
    attention_factor: float = 1.0  # yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factors: tuple[float, ...] = ()  # longrope: divisor of each frequency up to `original_length`
    long_factors: tuple[float, ...] = ()  # longrope: the same beyond it


class LayerConfig(NamedTuple):
    """What differs between the layers of a model."""

    window: int = 0  # a token attends to itself and the `window` - 1 tokens before it; 0: to all before it
    rope: int = 0  # index in `ModelConfig.ropes`
    experts: bool = False  # the MLP is a mixture of experts


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The mixture of experts of a layer. Weights of experts are the softmax over all of them.

    `normalise`: the weights of the chosen experts are divided by their sum.
    """

    count: int
    per_token: int
    width: int  # intermediate size of one expert
    normalise: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a decoder, from the config.json of its Hugging Face directory.

    The defaults are those of Llama. `norm_kind`: "pre" normalises the input of attention and MLP; "post" their
    output, before it is added to the residual stream; "sandwich" both. `qk_norm` normalises queries and keys before
    they are rotated: each head by itself, or all heads of a row as one vector.
    """

    path: Path
    name: str  # the model name in the API
    family: str  # a key of `families.FAMILIES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    max_position: int  # maximum length of a sequence, in tokens
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]  # all ids that end an answer
    query_scale: float  # factor of the products of queries and keys
    qkv_bias: bool = False
    out_bias: bool = False  # of the projection after attention
    mlp_bias: bool = False
    activation: Activation = "silu"
    norm_kind: NormKind = "pre"
    norm_offset: float = 0.0  # added to the stored weights of all norms
    qk_norm: QkNorm = ""
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    logits_softcap: float = 0.0
    embedding_scale: float = 1.0  # factor of the embeddings
    residual_scale: float = 1.0  # factor of what attention and MLP add to the residual stream
    logits_divisor: float = 1.0
    experts: ExpertsConfig | None = None
    quantisation: Mapping[str, Any] = field(default_factory=dict)  # quantization_config, if the weights are quantised

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def num_params(self) -> int:
        """Number of weights in the model. A tied embedding counts once. Biases are not counted."""
        return self._params(self.experts.count if self.experts else 0)

    @property
    def active_params(self) -> int:
        """Number of weights that the computation of one token uses: of all experts only the chosen ones."""
        return self._params(self.experts.per_token if self.experts else 0)

    @property
    def linear_params(self) -> int:
        """Number of weights in the linear layers, without experts, embedding and head, and with the norms."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        experts = self.experts.count * 3 * self.hidden_size * self.experts.width if self.experts else 0
        return self.num_params - tables - experts * sum(layer.experts for layer in self.layers)

    @property
    def mlp_width(self) -> int:
        """Largest number of activations of one token in an MLP, over all its experts."""
        dense = 0 if all(layer.experts for layer in self.layers) else self.intermediate_size
        return max(dense, self.experts.per_token * self.experts.width if self.experts else 0)

    @property
    def fp8_by_rows(self) -> bool:
        """True if the quantised matrices are FP8 with a factor for each row or for all, which GPUs can multiply."""
        match self.quantisation:
            case {"quant_method": "fp8"}:
                return not self.quantisation.get("weight_block_size")
            case {"quant_method": "compressed-tensors", "config_groups": {**groups}}:
                return bool(groups) and all(map(_is_fp8_by_rows, groups.values()))
        return False

    def _params(self, experts: int) -> int:
        """Count the weights, with `experts` experts in a layer that has some."""
        hidden = self.hidden_size
        qkv = hidden * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = qkv + self.num_heads * self.head_dim * hidden + self._norm_params()
        dense, mixture = 3 * hidden * self.intermediate_size, 0
        if self.experts:
            mixture = hidden * self.experts.count + experts * 3 * hidden * self.experts.width
        layers = sum(attention + (mixture if layer.experts else dense) for layer in self.layers)
        head = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return layers + head + hidden

    def _norm_params(self) -> int:
        """Count the weights of the norms in one layer."""
        around = self.hidden_size * (4 if self.norm_kind == "sandwich" else 2)
        heads = {"": 0, "head": 2, "row": self.num_heads + self.num_kv_heads}[self.qk_norm]
        return around + heads * self.head_dim


def _is_fp8_by_rows(group: object) -> bool:
    match group:
        case {"weights": {"type": "float", "strategy": "tensor" | "channel"}}:
            return True
    return False
