"""The configuration of a model, parsed from the JSON files of its Hugging Face directory.

It is everything that the daemon must know about a model before it loads weights. This module reads no weights and
imports neither torch nor numpy. `loader.open_model` also checks the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.models.files import ModelError as ModelError  # noqa: PLC0414  part of this module's interface
from daemon.models.files import read_json
from daemon.models.special_tokens import end_token_ids


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a Llama-family decoder, from the config.json of its Hugging Face directory."""

    path: Path
    name: str  # the model name in the API
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or {"rope_type": "llama3" | "linear", ...}
    max_position: int  # maximum length of a sequence, in tokens
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]  # all ids that end an answer

    @property
    def num_params(self) -> int:
        """Number of weights in the model. A tied embedding counts once. Biases are not counted."""
        qkv = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        out = self.num_heads * self.head_dim * self.hidden_size
        layer = qkv + out + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        head = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + head + self.hidden_size


def read_model_config(path: Path, name: str = "") -> ModelConfig:
    """Parse config.json of a Hugging Face directory, and find its end tokens in the other JSON files.

    `name` defaults to the name of the directory. Raises ModelError for every model that llumd cannot compute exactly
    as Transformers does.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory")
    config = read_json(path / "config.json")
    if config is None:
        raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model directory")
    try:
        return _parse(path, name or path.absolute().name, config)
    except ModelError as e:
        raise ModelError(f"{path}/config.json: {e}") from None


def check_tokenizer(path: Path) -> None:
    """Check that the directory `path` has a tokenizer.json. Raises ModelError if it has none."""
    if (path / "tokenizer.json").is_file():
        return
    if (path / "tokenizer.model").is_file():
        raise ModelError(
            f"{path} has tokenizer.model but no tokenizer.json; create it with "
            "transformers.AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        )
    raise ModelError(f"{path} has no tokenizer.json; copy it from the model's repository")


def _parse(path: Path, name: str, config: dict[str, Any]) -> ModelConfig:
    _check_architecture(config)
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    hidden = _count(config, "hidden_size")
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads and head_dim is not given")
    head_dim = _count(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    vocab = _count(config, "vocab_size")
    max_position = _count(config, "max_position_embeddings", 2048)
    theta, scaling = _rope(config, max_position)
    ends = end_token_ids(path, config)
    if any(token >= vocab for token in ends):
        raise ModelError(f"eos_token_id {max(ends)} is outside the vocabulary of {vocab} tokens")
    mistral = _architecture(config) == "MistralForCausalLM"
    return ModelConfig(
        path=path,
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=max_position,
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=False if mistral else _flag(config, "attention_bias"),
        mlp_bias=False if mistral else _flag(config, "mlp_bias"),
        eos_token_ids=ends,
    )


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        return str(named[0])
    by_type = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    return by_type.get(str(config.get("model_type")), str(named or config.get("model_type")))


def _check_architecture(config: dict[str, Any]) -> None:
    architecture = _architecture(config)
    if architecture not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise ModelError(
            f"architecture {architecture} is not supported; supported are LlamaForCausalLM "
            "and MistralForCausalLM without a sliding window"
        )
    # Without the key, Transformers uses a window of 4096. Only an explicit null makes the model a plain Llama.
    if architecture == "MistralForCausalLM" and config.get("sliding_window", 4096) is not None:
        raise ModelError("sliding-window attention is not supported; a Mistral model must have sliding_window null")
    if config.get("quantization_config") or config.get("compression_config"):
        raise ModelError(
            "quantised checkpoints are not supported; use the bf16 or fp32 weights of the model, or a .gguf file"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"activation {config['hidden_act']!r} is not supported; only silu is")


def _rope(config: dict[str, Any], max_position: int) -> tuple[float, dict[str, Any] | None]:
    """Return (theta, scaling) from `rope_parameters` (Transformers 5), or `rope_theta` and `rope_scaling` (older)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError("the rope parameters are not an object")
    theta = _positive(parameters, "rope_theta", _positive(config, "rope_theta", 10000.0))
    if any(c.get("partial_rotary_factor", 1) not in (1, None) for c in (config, parameters)):
        raise ModelError("partial rotary embeddings are not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, {"rope_type": kind, "factor": _positive(parameters, "factor")}
    if kind != "llama3":
        raise ModelError(f"rope scaling {kind!r} is not supported; supported are llama3, linear and none")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    scaling = {"rope_type": kind} | {n: _positive(parameters, n) for n in names}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ModelError("llama3 rope scaling needs a high_freq_factor above its low_freq_factor")
    original = _count(parameters, "original_max_position_embeddings", max_position)
    return theta, scaling | {"original_max_position_embeddings": original}


def _count(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(f"{key} is {value!r}; it must be a positive whole number")
    return value


def _positive(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {value!r}; it must be true or false")
    return value
