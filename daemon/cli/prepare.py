"""Checks before the start: everything that `llumd serve` and `llumd check` can refuse, before a process exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from daemon.api.key_file import read_key_file
from daemon.cli import devices, gpu_kernels
from daemon.cli.limits import (
    check_machine_limits,
    check_model_limits,
    default_frontends,
    kept_connections_warning,
)
from daemon.cli.memory_budget import Hardware, dequantised_warning, kv_pool_bytes
from daemon.config import Config, ConfigError
from daemon.engine.cuda.kernels import multiplies_fp8
from daemon.ipc.keys_page import Key
from daemon.machine import cpus, measure
from daemon.models import store
from daemon.models.loader import open_model, stored_bytes
from daemon.models.model_config import ModelConfig
from daemon.models.text_files import checked


class Prepared(NamedTuple):
    """What the daemon needs to start, checked."""

    config: Config  # with `devices`, `served_name` and the defaults for GPUs filled in
    model_config: ModelConfig
    model_dir: Path
    pool_bytes: int  # KV pool of each engine in the memory of the machine
    keys: list[Key] | None  # of `api_key_file`; None: clients need no key
    hardware: Hardware = Hardware()


def prepare(config: Config, progress: Callable[[str], None], *, on_trial: bool = False) -> Prepared:
    """Complete the settings, get the model and check both. Calls `progress` with a text before each slow step.

    Missing kernels are compiled at the end; `on_trial`: not compiled, but it is checked that they could be, and
    weights that are still on the hub stay there. Raises ConfigError or ModelError for everything that cannot work.
    """
    config = dataclasses.replace(config, devices=config.devices or devices.default_devices(config, progress))
    if config.on_gpus:
        config = config.for_gpus()
        if "frontends" not in config.origin:
            config = dataclasses.replace(config, frontends=default_frontends(config, cpus()))
    config.check()
    keys = read_key_file(Path(config.api_key_file)) if config.api_key_file else None
    if config.script:
        from daemon.engine.fake.script import read_script

        read_script(Path(config.script))
    # The engines without a model do not use the weights, but the frontends use the tokenizer.
    load_format = config.load_format if config.engine == "model" else "dummy"
    model_dir = store.resolve(config.model, "dummy" if on_trial else load_format, progress)
    if on_trial and not store.has_weights(config.model):
        load_format = "dummy"
        progress(f"note: the weights are not downloaded yet; `llumd pull {config.model}` does it")
    with checked(model_dir):  # at the same time as the other checks
        model_config = _open_model(config, model_dir, load_format, progress)
        config = dataclasses.replace(config, served_name=config.served_name or [model_config.name])
        check_model_limits(config, model_config)
        missing: gpu_kernels.Missing = {}
        machine = measure()
        hardware = Hardware(bf16=machine.bf16)
        if config.on_gpus:
            gpus = devices.check_gpus(config)
            hardware = Hardware(fp8=bool(gpus.archs) and all(map(multiplies_fp8, gpus.archs)))
            missing = gpu_kernels.missing_kernels(config, model_config, gpus)
        pool_bytes = kv_pool_bytes(config, model_config, len(config.devices), machine.memory, hardware)
        check_machine_limits(config, machine, pool_bytes)
        dequantised = dequantised_warning(config, model_config, stored_bytes(model_dir), hardware)
        for warning in (kept_connections_warning(config, machine), dequantised):
            if warning:
                progress(warning)
    if missing and on_trial:
        gpu_kernels.check_tools(missing, progress)
    elif missing:
        gpu_kernels.build_kernels(missing, progress)
    return Prepared(config, model_config, model_dir, pool_bytes, keys, hardware)


def _open_model(config: Config, model_dir: Path, load_format: str, progress: Callable[[str], None]) -> ModelConfig:
    name = config.main_name or store.default_name(config.model)
    model_config = open_model(model_dir, name, load_format)
    try:
        "".join([model_config.name, *config.served_name]).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the name of {model_dir} is not UTF-8; set another name with --served-name") from None
    if config.engine == "script" and not model_config.eos_token_ids:
        raise ConfigError(f"engine: {model_config.name} has no known end token, with which a script ends its answers")
    if config.engine == "model" and not model_config.eos_token_ids:
        progress(
            f"warning: {model_config.name} has no known end token, so an answer ends only at max_tokens or a stop "
            "string; set eos_token_id in its config.json"
        )
    return model_config
