"""Runs a module of this package in a process of its own: what it imports and reads stays out of this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGE_ROOT = Path(__file__).parents[2]


def start_module(module: str, argument: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``python -m module argument`` with pipes for its output. `environ`: None for that of this process."""
    return subprocess.Popen(
        [sys.executable, "-m", module, argument],
        cwd=_PACKAGE_ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # signals to the group of this process are for this process to handle
    )
