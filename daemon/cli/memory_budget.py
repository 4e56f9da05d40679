"""Size of the KV pool of each engine, and the check that weights and pools fit into memory. Pure."""

from __future__ import annotations

from daemon.config import Config, ConfigError
from daemon.engine.cpu.memory import activation_bytes, embedding_bytes, weights_bytes
from daemon.models.model_config import ModelConfig

MIN_POOL = 1 << 20  # bytes, for engines without a model and for engines whose pool is on a GPU
_MAX_DEFAULT = 2 << 30  # bytes
_MIN_TOKENS = 256  # a smaller pool cannot serve a usual request
_KV_ITEM_BYTES = 4  # the CPU pool is fp32
_ENGINE_OVERHEAD = 400 << 20  # bytes: interpreter and libraries of one engine


def kv_pool_bytes(config: Config, model_config: ModelConfig, engines: int, available: int) -> int:
    """Return the size in bytes of the KV pool of one engine. `available`: free memory of the machine, in bytes.

    An engine on a GPU computes the size of its own pool. Raises ConfigError if weights and pools do not fit.
    """
    if config.engine != "model":
        return config.kv_memory or MIN_POOL
    if config.on_gpus:
        return MIN_POOL
    token_bytes, weights = kv_token_bytes(config, model_config), engine_bytes(config, model_config)
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


def dequantised_warning(config: Config, model_config: ModelConfig, stored: int) -> str:
    """Return how large quantised weights become when they are loaded; "" if they are not quantised.

    `stored`: bytes of the checkpoint.
    """
    if not model_config.quantisation or config.engine != "model" or config.load_format == "dummy":
        return ""
    arithmetic = arithmetic_of(config)
    method = model_config.quantisation.get("quant_method")
    loaded = weights_bytes(model_config, arithmetic) + embedding_bytes(model_config)
    return (
        f"warning: the {method} weights of {model_config.name}, {_mib(stored)}, are dequantised when they are "
        f"loaded: each engine needs about {_mib(loaded)} for them, as for the model in {arithmetic}"
    )


def kv_token_bytes(config: Config, model_config: ModelConfig) -> int:
    """Return the bytes of the KV cache that one token needs."""
    item = _KV_ITEM_BYTES if not config.on_gpus else 1 if config.kv_dtype == "fp8" else 2
    return 2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim * item


def engine_bytes(config: Config, model_config: ModelConfig) -> int:
    """Return the bytes that a CPU engine needs besides its KV pool: weights, activations and the process itself."""
    arithmetic = arithmetic_of(config)
    weights = _ENGINE_OVERHEAD + weights_bytes(model_config, arithmetic) + embedding_bytes(model_config)
    return weights + activation_bytes(
        model_config,
        arithmetic,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or model_config.max_position,
    )


def arithmetic_of(config: Config) -> str:
    """Return the type of the weights in the memory of an engine; for `auto` on a CPU the smaller one."""
    return "fp32" if config.dtype == "fp32" or config.deterministic else "bf16"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
