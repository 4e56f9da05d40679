"""Options that depend on each other, or contradict each other. Pure.

Relations between an option and the machine or the model are in `cli/limits.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from daemon.option import ConfigError

if TYPE_CHECKING:
    from daemon.config import Config

MAX_ENGINES = 64


def check_relations(config: Config) -> None:
    """Raise ConfigError for options that cannot be used together.

    While `devices` is still empty, what depends on the devices is not checked.
    """
    _check_devices(config)
    _check_scaling(config)
    _check_contradictions(config)
    _check_lengths(config)
    if config.host not in ("127.0.0.1", "::1", "localhost") and not config.api_key_file:
        why = (
            f"other machines can reach {config.host}; set api_key_file, or set allow_unauthenticated to true "
            "if every client that can connect may use the model"
        )
        require(config, config.allow_unauthenticated, "host", why)


def require(config: Config, condition: bool, name: str, why: str) -> None:
    """Raise ConfigError, which names the option and its source, unless `condition` is true."""
    if not condition:
        source = f" ({config.origin[name]})" if name in config.origin else ""
        raise ConfigError(f"{name}{source}: {why}")


def _check_devices(config: Config) -> None:
    for d in config.devices:
        known = bool(re.fullmatch(r"cpu|cuda:[0-9]{1,4}", d))
        require(config, known, "devices", f"{d[:40]!r} is not a device; write `cpu` or `cuda:N`")
    most = f"lists {len(config.devices)} engines; it may list at most {MAX_ENGINES}"
    require(config, len(config.devices) <= MAX_ENGINES, "devices", most)
    mixed = "cpu" in config.devices and any(d != "cpu" for d in config.devices)
    why = "lists both `cpu` and `cuda:N`; choose one of them, because requests cannot move between them"
    require(config, not mixed, "devices", why)
    if config.on_gpus:
        require(config, config.dtype != "fp32", "dtype", "GPUs compute in bf16; choose auto or bf16")
        why = "is for the CPU only, because the rounding of a GPU depends on the batch; set it to false"
        require(config, not config.deterministic, "deterministic", why)
    elif config.devices and config.engine == "model":
        require(config, config.kv_dtype == "auto", "kv_dtype", "fp8 is for GPUs only; on the CPU choose auto")


def _check_scaling(config: Config) -> None:
    if config.devices:
        for name in ("min_engines", "max_engines"):
            why = f"must be at most {len(config.devices)}, the number of engines in `devices`"
            require(config, getattr(config, name) <= len(config.devices), name, why)
    if config.max_engines:
        why = f"must be at most {config.max_engines}, the value of max_engines"
        require(config, config.min_engines <= config.max_engines, "min_engines", why)
        why = "has no effect while min_engines is 0 (auto-scaling is off); set min_engines too"
        require(config, config.min_engines > 0, "max_engines", why)


def _check_contradictions(config: Config) -> None:
    """Check options of which one takes the effect of the other. A default gives way to a value that is set."""
    why = "names no file; the engine `script` needs one"
    require(config, config.engine != "script" or bool(config.script), "script", why)
    why = f"has no effect on the engine `{config.engine}`; set engine to script"
    require(config, config.engine == "script" or not config.script, "script", why)
    if config.engine == "model":
        why = "needs fp32; set dtype to auto or fp32, or deterministic to false"
        require(config, not (config.deterministic and config.dtype == "bf16"), "deterministic", why)
    if "prefix_affinity" in config.origin:
        why = "needs prefix_caching, which is false; set both or none"
        require(config, config.prefix_caching or not config.prefix_affinity, "prefix_affinity", why)
    if "max_choices" in config.origin:
        _check_at_most(config, "max_choices", "max_queued")
    if "body_memory" in config.origin:
        why = f"must be at least {config.max_body}, the value of max_body: it must hold the largest body"
        require(config, config.max_body <= config.body_memory, "body_memory", why)
    if "max_num_seqs" in config.origin and config.devices:  # the default of max_batch_tokens depends on the devices
        _check_at_most(config, "max_num_seqs", "max_batch_tokens")


def _check_lengths(config: Config) -> None:
    if config.max_model_len:
        for name in ("max_prompt_tokens", "max_output_tokens"):
            if name in config.origin:
                why = f"must be below {config.max_model_len}, the value of max_model_len"
                require(config, getattr(config, name) < config.max_model_len, name, why)


def _check_at_most(config: Config, name: str, bound: str) -> None:
    why = f"must be at most {getattr(config, bound)}, the value of {bound}"
    require(config, getattr(config, name) <= getattr(config, bound), name, why)
