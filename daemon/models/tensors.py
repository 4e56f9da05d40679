"""The tensors of a model: their canonical names and shapes, and where a checkpoint has them.

The engines, random weights and conversions use canonical names only: those of Llama's Hugging Face checkpoints, and
a few more for what Llama has not. A linear layer has the shape [out, in].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from daemon.models.architecture import LayerConfig, ModelConfig, NormKind
from daemon.models.families import FAMILIES, Place, Shape
from daemon.models.files import ModelError


class LayerNorms(NamedTuple):
    """Names of the norms in a layer; "" where it has none."""

    before_attention: str
    after_attention: str
    before_mlp: str
    after_mlp: str


NORMS: dict[NormKind, LayerNorms] = {
    "pre": LayerNorms("input_layernorm", "", "post_attention_layernorm", ""),
    "sandwich": LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    "post": LayerNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
}


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every tensor that the model needs, by its canonical name."""
    out: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i, layer in enumerate(config.layers):
        out |= {f"model.layers.{i}.{name}": shape for name, shape in _layer(config, layer)}
    out["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        out["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return out


def find_tensors(config: ModelConfig, stored: Collection[str]) -> dict[str, Place]:
    """Return the place of each canonical tensor in a checkpoint that has the tensors `stored`.

    Raises ModelError for a tensor that it lacks, and for one that the model has no place for: without it we would
    compute another model.
    """
    family = FAMILIES[config.family]
    found: dict[str, Place] = {}
    for name, shape in expected_tensors(config).items():
        places = [*family.places(config, name, shape), Place(name, shape)]
        place = next((p for p in places if p.name in stored), None)
        if place is None:
            raise ModelError(f"{config.path}: the weights lack the tensor {places[0].name}")
        found[name] = place
    used = {place.name for place in found.values()}
    if config.tie_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        used |= {"lm_head.weight", *(p.name for p in family.places(config, "lm_head.weight", shape))}
    if extra := [name for name in stored if name not in used and not family.ignores(name)]:
        raise ModelError(
            f"{config.path}: the weights have {len(extra)} tensors that config.json has no place for, "
            f"for example {min(extra)}"
        )
    return found


def _layer(config: ModelConfig, layer: LayerConfig) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for norm in NORMS[config.norm_kind]:
        if norm:
            yield f"{norm}.weight", (hidden,)
    qkv = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    yield from _linears(qkv, config.qkv_bias)
    yield from _linears({"self_attn.o_proj": (hidden, q)}, config.out_bias)
    if config.qk_norm:
        head = config.qk_norm == "head"
        yield "self_attn.q_norm.weight", (config.head_dim if head else q,)
        yield "self_attn.k_norm.weight", (config.head_dim if head else kv,)
    experts = config.experts
    if not layer.experts or experts is None:
        yield from _linears(_mlp("mlp", hidden, config.intermediate_size), config.mlp_bias)
        return
    yield "mlp.gate.weight", (experts.count, hidden)
    for e in range(experts.count):
        yield from _linears(_mlp(f"mlp.experts.{e}", hidden, experts.width), config.mlp_bias)


def _mlp(at: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{at}.gate_proj": (inner, hidden),
        f"{at}.up_proj": (inner, hidden),
        f"{at}.down_proj": (hidden, inner),
    }


def _linears(shapes: Mapping[str, Shape], bias: bool) -> Iterator[tuple[str, Shape]]:
    for name, shape in shapes.items():
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]
