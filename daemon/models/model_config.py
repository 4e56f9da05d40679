"""Reading the configuration of a model from the JSON files of its Hugging Face directory.

It is everything that the daemon must know about a model before it loads weights. This module reads no weights and
imports neither torch nor numpy. `loader.open_model` also checks the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.models.architecture import LayerConfig
from daemon.models.architecture import ModelConfig as ModelConfig  # noqa: PLC0414  part of this module's interface
from daemon.models.config_values import RawConfig, count, flag, positive
from daemon.models.families import Family, family_of
from daemon.models.files import ModelError as ModelError  # noqa: PLC0414
from daemon.models.files import read_json
from daemon.models.rope_config import longest
from daemon.models.special_tokens import end_token_ids

_DEFAULTS = {"max_position_embeddings": 2048}


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
    family = family_of(config)
    config = _complete(family, config)
    _check_common(config)
    heads = count(config, "num_attention_heads")
    kv_heads = count(config, "num_key_value_heads", heads)
    hidden = count(config, "hidden_size")
    if heads % kv_heads:
        raise ModelError(
            f"{heads} attention heads (num_attention_heads) cannot share {kv_heads} key/value heads "
            "(num_key_value_heads) evenly"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads and head_dim is not given")
    head_dim = count(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    vocab = count(config, "vocab_size")
    ropes = family.ropes(config, head_dim)
    ends = end_token_ids(path, config)
    if any(token >= vocab for token in ends):
        raise ModelError(f"eos_token_id {max(ends)} is outside the vocabulary of {vocab} tokens")
    base = ModelConfig(
        path=path,
        name=name,
        family=family.name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=count(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
        layers=(LayerConfig(),) * count(config, "num_hidden_layers"),
        ropes=ropes,
        max_position=longest(config, ropes[0]),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        eos_token_ids=ends,
        query_scale=head_dim**-0.5,
        quantisation=_quantisation(config),
    )
    return family.describe(base, config)


def _complete(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the language model, with the family's defaults for missing keys."""
    inner = config.get(family.text_config, {}) if family.text_config else {}
    if not isinstance(inner, dict):
        raise ModelError(f"{family.text_config} is not an object")
    return _DEFAULTS | dict(family.defaults) | config | inner


def _quantisation(config: RawConfig) -> dict[str, Any]:
    """Return how the weights are quantised. `daemon.models.quantised` reads it when there are weights to open."""
    for key in ("quantization_config", "compression_config"):  # the second: early compressed-tensors
        if value := config.get(key):
            if not isinstance(value, dict):
                raise ModelError(f"{key} is not an object")
            return value
    return {}


def _check_common(config: RawConfig) -> None:
    if "hidden_activation" not in config and config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"hidden_act is {config['hidden_act']!r}; supported is 'silu'")
