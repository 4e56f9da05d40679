"""Conversion of a GGUF file: dequantised weights, config.json and the tokenizer, all from the file.

The `gguf` package reads the file, one tensor in memory at a time. Weights become bfloat16, except if the file has
float32 matrices. The rounding (2^-9 relative) is far below that of every quantisation in GGUF, the published weights
of such models are bfloat16 themselves, and the directory, its load time and its page cache are half as large.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daemon.models import checkpoint
from daemon.models.gguf.tokenizer import write_tokenizer
from daemon.models.loader import open_model
from daemon.models.model_config import ModelConfig, ModelError, read_model_config
from daemon.models.tensors import expected_tensors
from daemon.units import quoted

_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GGUF:
    """An open GGUF file: metadata as plain values, tensors still quantised (mapped into memory, not read)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]  # gguf.ReaderTensor by name

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value of the section of the architecture, such as `context_length`."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)

    def number(self, key: str, default: float | None = None) -> int | float:
        """Return a metadata value of that section that is a finite number. Raises ModelError for any other value."""
        value = self.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no value for {key}")
        if isinstance(value, list):
            raise ModelError(f"{self.path}: {key} differs from layer to layer, which is not supported")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ModelError(f"{self.path}: {key} is {quoted(value)}, which is not a number; download the file again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a metadata value of that section that is a whole number above 0. Raises ModelError."""
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{self.path}: {key} is {value}, which is not a whole number above 0")
        return value

    @property
    def dtype(self) -> str:
        """Type of the converted weights, as safetensors names it."""
        float32 = any(t.tensor_type.name == "F32" and len(t.shape) == 2 for t in self.tensors.values())
        return "F32" if float32 else "BF16"

    @property
    def converted_bytes(self) -> int:
        """Size of the converted weights in bytes."""
        return sum(math.prod(map(int, t.shape)) for t in self.tensors.values()) * checkpoint.ITEM_BYTES[self.dtype]


def open_gguf(file: Path) -> GGUF:
    """Read metadata and tensor table. Raises ModelError if the file is damaged or the model is not a plain Llama."""
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise ModelError(
            f"converting {file.name} needs the Python package {e.name}: pip install 'llumd[convert]'"
        ) from None
    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as e:  # the reader fails in many ways on a truncated file
        raise ModelError(f"{file} is not a complete GGUF file: {e}") from None
    opened = GGUF(file, metadata, tensors)
    check(opened)
    return opened


def convert(source: GGUF, directory: Path) -> None:
    """Write config.json, the weights, tokenizer.json and the chat template to `directory`, and check them.

    Raises ModelError; then the caller must delete the directory.
    """
    config = config_of(source)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(source.metadata, directory)
    model_config = read_model_config(directory)
    checkpoint.write(directory, expected_tensors(model_config), source.dtype, _Loader(source, model_config))
    open_model(directory)


def config_of(source: GGUF) -> dict[str, Any]:
    """Return the content of config.json."""
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path} lacks token_embd.weight")
    heads, hidden = source.count("attention.head_count"), source.count("embedding_length")
    head_dim = source.count("attention.key_length", hidden // heads)
    eos = [source.metadata.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
    eos_ids = [token for i, token in enumerate(eos) if token is not None and token not in eos[:i]]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": source.count("feed_forward_length"),
        "num_hidden_layers": source.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": source.count("context_length"),
        # Metadata has float32 values. Their shortest decimal is the value that the author of the model wrote.
        "rms_norm_eps": float(str(np.float32(source.number("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(str(np.float32(source.number("rope.freq_base", 10000.0)))),
        "rope_scaling": _rope_scaling(source, head_dim),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in source.tensors,
        "bos_token_id": source.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[source.dtype],
    }


def gguf_name(name: str) -> str:
    """Return the GGUF name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[inner]}.{kind}"


class _Loader:
    """Function from the Hugging Face name of a tensor to its float32 values."""

    def __init__(self, source: GGUF, model_config: ModelConfig) -> None:
        self._source = source
        self._heads = {"attn_q": model_config.num_heads, "attn_k": model_config.num_kv_heads}

    def __call__(self, name: str) -> np.ndarray:
        from gguf import dequantize

        source_name = gguf_name(name)
        tensor = self._source.tensors.get(source_name)
        if tensor is None:
            raise ModelError(f"{self._source.path} lacks {source_name}")
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self._source.path}: the type {tensor.tensor_type.name} of {source_name} is not supported"
            ) from None
        values = np.asarray(values, dtype=np.float32).reshape([int(n) for n in reversed(tensor.shape)])
        heads = self._heads.get(source_name.split(".")[-2])
        return values if heads is None else _to_halves(values, heads)


def _to_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from (even, odd) pairs, the rotary layout of GGUF, to (first, second) halves.

    `values` and the result have the shape [heads * head_dim, ...].
    """
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def check(source: GGUF) -> None:
    """Raise ModelError unless the model is a plain Llama."""
    architecture = source.metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{source.path}: architecture {architecture!r} is not supported; only llama is")
    if source.metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(f"{source.path} is one of several parts; merge them with llama-gguf-split --merge")
    if source.get("expert_count", 0):
        raise ModelError(f"{source.path} is a mixture of experts, which is not supported")
    known = {_ROPE_FACTORS, *(f"{n}.weight" for n in _TOP.values())}
    inner = {f"{n}.{kind}" for n in _LAYER.values() for kind in ("weight", "bias")}
    for name in source.tensors:
        if name not in known and not (name.startswith("blk.") and name.split(".", 2)[2] in inner):
            raise ModelError(f"{source.path} has the tensor {name}, which a plain Llama does not have")
    length = source.count(
        "attention.key_length", source.count("embedding_length") // source.count("attention.head_count")
    )
    if {source.number(key, length) or length for key in ("rope.dimension_count", "attention.value_length")} != {
        length
    }:
        raise ModelError(f"{source.path}: partly rotated heads and unequal head sizes are not supported")


def _rope_scaling(source: GGUF, head_dim: int) -> dict[str, Any] | None:
    kind = source.get("rope.scaling.type", "none")
    if _ROPE_FACTORS in source.tensors:
        return _llama3_scaling(source, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": source.number("rope.scaling.factor", 1.0)}
    raise ModelError(f"{source.path}: rope scaling {kind!r} is not supported; supported are llama3, linear and none")


def _llama3_scaling(source: GGUF, head_dim: int) -> dict[str, Any]:
    """Return the rope scaling of Llama 3.1 and later. GGUF stores its result: the divisor of each frequency."""
    divisors = np.asarray(source.tensors[_ROPE_FACTORS].data, dtype=np.float64)
    theta = source.number("rope.freq_base", 10000.0)
    factor = round(float(divisors.max()), 4)
    low, high, original = 1.0, 4.0, 8192  # the same in every published model
    rotations = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    if divisors.shape != rotations.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise ModelError(
            f"{source.path}: its rope frequency factors are not from llama3 scaling, which is the only kind supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
