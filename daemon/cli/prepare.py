"""Checks before the start: everything that `llumd serve` and `llumd check` can refuse, before a process exists."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from daemon.api.key_file import read_key_file
from daemon.cli import devices
from daemon.cli.memory_budget import kv_pool_bytes
from daemon.config import Config
from daemon.ipc.keys_page import Key
from daemon.models import store
from daemon.models.loader import open_model
from daemon.models.model_config import ModelConfig, check_tokenizer


class Prepared(NamedTuple):
    """What the daemon needs to start, checked."""

    config: Config  # with `devices`, `served_name` and the defaults for GPUs filled in
    model_config: ModelConfig
    model_dir: Path
    pool_bytes: int  # KV pool of each engine in the memory of the machine
    keys: list[Key] | None  # of `api_key_file`; None: clients need no key


def prepare(config: Config, progress: Callable[[str], None]) -> Prepared:
    """Complete the settings, get the model and check both. Calls `progress` with a text before each slow step.

    Raises ConfigError or ModelError for everything that cannot work.
    """
    config = dataclasses.replace(config, devices=config.devices or devices.default_devices(config, progress))
    config = config.for_gpus() if config.on_gpus else config
    config.check()
    keys = read_key_file(Path(config.api_key_file)) if config.api_key_file else None
    model_dir = store.resolve(config.model, config.load_format, progress)
    # The stub and hash engines do not use the weights, but the frontends use the tokenizer.
    load_format = config.load_format if config.engine == "model" else "dummy"
    model_config = open_model(model_dir, config.served_name, load_format)
    check_tokenizer(model_dir)
    if config.engine == "model" and not model_config.eos_token_ids:
        progress(
            f"warning: {model_config.name} has no known end token, so an answer ends only at max_tokens or a stop "
            "string; set eos_token_id in its config.json"
        )
    if config.on_gpus:
        devices.check_gpus(config, model_config)
    config = dataclasses.replace(config, served_name=model_config.name)
    pool_bytes = kv_pool_bytes(config, model_config, len(config.devices), _available_memory())
    return Prepared(config, model_config, model_dir, pool_bytes, keys)


def _available_memory() -> int:
    """Return the free memory of the machine in bytes, with the page cache that the kernel can drop."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
