"""Where llumd keeps files: converted models and compiled kernels, and the admin socket."""

from __future__ import annotations

import os
from pathlib import Path

from daemon.config import Config


def cache_dir() -> Path:
    """Return the directory of converted models and compiled kernels.

    It is $LLUMD_CACHE, $CACHE_DIRECTORY (systemd), $XDG_CACHE_HOME/llumd or ~/.cache/llumd: the first that is set.
    """
    for name in ("LLUMD_CACHE", "CACHE_DIRECTORY"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llumd"


def run_dir(config: Config | None = None) -> Path:
    """Return the directory of the admin socket. The option `run_dir` of `config` wins over the environment."""
    if config is not None and config.run_dir:
        return Path(config.run_dir)
    if os.environ.get("RUNTIME_DIRECTORY"):
        return Path(os.environ["RUNTIME_DIRECTORY"])
    if os.environ.get("XDG_RUNTIME_DIR"):
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "llumd"
    return Path("/run/llumd") if os.geteuid() == 0 else Path(f"/tmp/llumd-{os.getuid()}")
