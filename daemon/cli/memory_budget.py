"""Size of the KV pool of each engine, and the check that weights and pools fit into memory. Pure."""

from __future__ import annotations

from typing import NamedTuple

from daemon.config import Config, ConfigError
from daemon.engine.cpu.memory import ITEM_BYTES, activation_bytes, embedding_bytes, weights_bytes
from daemon.models.model_config import ModelConfig

MIN_POOL = 1 << 20  # bytes, for engines without a model and for engines whose pool is on a GPU
_MAX_DEFAULT = 2 << 30  # bytes
_MIN_TOKENS = 256  # a smaller pool cannot serve a usual request
_ENGINE_OVERHEAD = 400 << 20  # bytes: interpreter and libraries of one engine


class Hardware(NamedTuple):
    """The small types that the machine multiplies: with the `dtype` auto, engines compute in them."""

    bf16: bool = False  # its CPU, see `machine.has_bf16`
    fp8: bool = False  # all its GPUs


PLAIN = Hardware()


def kv_pool_bytes(
    config: Config, model_config: ModelConfig, engines: int, available: int, hardware: Hardware = PLAIN
) -> int:
    """Return the size in bytes of the KV pool of one engine. `available`: free memory of the machine, in bytes.

    An engine on a GPU computes the size of its own pool. Raises ConfigError if weights and pools do not fit.
    """
    if config.engine != "model":
        return config.kv_memory or MIN_POOL
    if config.on_gpus:
        return MIN_POOL
    token_bytes = kv_token_bytes(config, model_config, hardware)
    weights = engine_bytes(config, model_config, hardware)
    pool = config.kv_memory or min(_MAX_DEFAULT, available // 4 // engines)
    if pool < token_bytes * _MIN_TOKENS:
        raise ConfigError(
            f"kv_memory: {_mib(pool)} has room for {pool // token_bytes} tokens of {model_config.name}; "
            f"set it to at least {_mib(token_bytes * _MIN_TOKENS)}"
        )
    if engines * (weights + pool) > available:
        raise ConfigError(
            f"{model_config.name} does not fit: {engines} engines need {_mib(weights)} for weights and {_mib(pool)} "
            f"of KV cache each, {_mib(available)} is free; lower kv_memory or list fewer devices"
        )
    return pool


def dequantised_warning(config: Config, model_config: ModelConfig, stored: int, hardware: Hardware = PLAIN) -> str:
    """Return how large quantised weights become when they are loaded; "" if they are not quantised.

    `stored`: bytes of the checkpoint.
    """
    if not model_config.quantisation or config.engine != "model" or config.load_format == "dummy":
        return ""
    if keeps_fp8(config, model_config, hardware):
        return ""
    method = model_config.quantisation.get("quant_method")
    loaded = loaded_bytes(config, model_config, hardware)
    return (
        f"warning: the {method} weights of {model_config.name}, {_mib(stored)}, are dequantised when they are "
        f"loaded: each engine needs about {_mib(loaded)} for them, as for the model in "
        f"{arithmetic_of(config, hardware)}"
    )


def kv_token_bytes(config: Config, model_config: ModelConfig, hardware: Hardware = PLAIN) -> int:
    """Return the bytes of the KV cache that one token needs."""
    item = 1 if config.on_gpus and config.kv_dtype == "fp8" else ITEM_BYTES[arithmetic_of(config, hardware)]
    return 2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim * item


def loaded_bytes(config: Config, model_config: ModelConfig, hardware: Hardware = PLAIN) -> int:
    """Return the bytes of an engine's weights after they are loaded, with the embedding table."""
    if config.on_gpus:
        kept = model_config.linear_params if keeps_fp8(config, model_config, hardware) else 0
        return model_config.num_params * ITEM_BYTES["bf16"] - kept
    return weights_bytes(model_config, arithmetic_of(config, hardware)) + embedding_bytes(model_config)


def keeps_fp8(config: Config, model_config: ModelConfig, hardware: Hardware = PLAIN) -> bool:
    """Return True if engines compute with the FP8 weights of linear layers as they are stored."""
    as_stored = config.dtype == "auto" and config.load_format != "dummy"
    return config.on_gpus and as_stored and hardware.fp8 and model_config.fp8_by_rows


def engine_bytes(config: Config, model_config: ModelConfig, hardware: Hardware = PLAIN) -> int:
    """Return the bytes that a CPU engine needs besides its KV pool: weights, activations and the process itself."""
    weights = _ENGINE_OVERHEAD + loaded_bytes(config, model_config, hardware)
    return weights + activation_bytes(
        model_config,
        arithmetic_of(config, hardware),
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or model_config.max_position,
    )


def arithmetic_of(config: Config, hardware: Hardware = PLAIN) -> str:
    """Return the type in which an engine computes, that of its weights and KV in memory."""
    if config.on_gpus:
        return "bf16"
    if config.deterministic or config.dtype == "fp32":
        return "fp32"
    return "bf16" if hardware.bf16 or config.dtype == "bf16" else "fp32"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
