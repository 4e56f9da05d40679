"""Stand-ins for an NVIDIA driver: nvidia-smi as a script on PATH, and the files of the driver below a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.engine.cuda import driver


class FakeDriver:
    """The driver of a machine in `root`. Without calls it is a machine without one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.tools = root / "tools"
        self.tools.mkdir(parents=True)
        monkeypatch.setattr(driver, "ROOT", root)
        monkeypatch.setenv("PATH", str(self.tools))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def smi(self, *rows: str, status: int = 0) -> None:
        """Let nvidia-smi print these rows, for example "9.0, 580.65.06, Disabled"."""
        lines = "".join(f"{row}\\n" for row in rows)
        (self.tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {status}\n")
        (self.tools / "nvidia-smi").chmod(0o755)

    def module(self, gpus: int, version: str = "") -> None:
        """Let the kernel module have this many GPUs."""
        folder = self.root / "proc/driver/nvidia"
        for i in range(gpus):
            (folder / "gpus" / f"0000:{i:02x}:00.0").mkdir(parents=True)
        if version:
            folder.mkdir(parents=True, exist_ok=True)
            line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (dvs)"
            (folder / "version").write_text(f"{line}\nGCC version:  gcc version 13.3.0\n")

    def nodes(self, *names: str) -> None:
        """Make device files."""
        (self.root / "dev").mkdir(exist_ok=True)
        for name in names:
            (self.root / "dev" / name).touch()
