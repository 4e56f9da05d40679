"""How much memory an engine's KV pool gets, and whether the model fits at all. Pure."""

from __future__ import annotations

from daemon.config import Config, ConfigError
from daemon.engine.cpu.memory import activation_bytes, embedding_bytes, weights_bytes
from daemon.models.model_config import ModelConfig

MODELLESS_POOL = 1 << 20  # bytes, for engines without a model, or whose pool is on a GPU
_LARGEST_DEFAULT = 2 << 30
_LEAST_TOKENS = 256  # a pool below this serves nobody
_KV_ITEM_BYTES = 4  # the CPU pool holds fp32
_ENGINE_OVERHEAD = 400 << 20  # interpreter and libraries of one engine


def kv_pool_bytes(config: Config, model_config: ModelConfig, engines: int, available: int) -> int:
    """Bytes of one engine's pool in the machine's memory. `available`: what of that is free, in bytes.

    An engine on a GPU finds out for itself what fits there.
    Raises ConfigError, saying what to change, if weights and pools do not fit.
    """
    if config.engine != "model":
        return config.kv_memory or MODELLESS_POOL
    if config.on_gpus:
        return MODELLESS_POOL
    token_bytes = 2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim * _KV_ITEM_BYTES
    arithmetic = "fp32" if config.dtype == "fp32" or config.deterministic else "bf16"
    weights = _ENGINE_OVERHEAD + weights_bytes(model_config, arithmetic) + embedding_bytes(model_config)
    weights += activation_bytes(
        model_config,
        arithmetic,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or model_config.max_position,
    )
    pool = config.kv_memory or min(_LARGEST_DEFAULT, available // 4 // engines)
    if pool < token_bytes * _LEAST_TOKENS:
        raise ConfigError(
            f"kv_memory: {_mib(pool)} holds {pool // token_bytes} tokens of {model_config.name}; "
            f"give it at least {_mib(token_bytes * _LEAST_TOKENS)}"
        )
    if engines * (weights + pool) > available:
        raise ConfigError(
            f"{model_config.name} does not fit: {engines} engines need {_mib(weights)} for weights and {_mib(pool)} "
            f"for KV each, {_mib(available)} is free; lower kv_memory or name fewer devices"
        )
    return pool


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
