"""The tests in here need a CUDA device and compiled kernels; without either they are skipped, with the reason.

    .venv/bin/python -m pytest tests/gpu -rs

The files are numbered: what stands on something else comes after it, so the first failure tells most.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAD_DIMS = (64, 128)  # of the models in here
REMARKS: list[str] = []  # figures for the end of the report


def why_not() -> str:
    """What is missing here; empty if nothing is. Without a driver torch is not even imported."""
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        return "no CUDA device: there is no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return "PyTorch is a build for the CPU; LLUMD_TORCH=cuda bin/test sets up the other"
    if not torch.cuda.is_available():
        return "no CUDA device: PyTorch sees none"
    return _kernels()[1]


def _kernels() -> tuple[Path | None, str]:
    """Where the kernels for device 0 lie, or why they cannot be used."""
    import torch

    from daemon.engine.cuda import kernels
    from tests.gpu.parts import model_config_of

    arch = kernels.arch_of(*torch.cuda.get_device_capability(0))
    cards = [model_config_of(head_dim) for head_dim in HEAD_DIMS]
    try:
        specs = [
            spec
            for config in cards
            for kv in ("auto", "fp8")
            for spec in kernels.required(config, arch=arch, kv_dtype=kv)
        ]
        return kernels.check({spec.name: spec for spec in specs}.values(), arch), ""
    except kernels.KernelError as e:
        return None, str(e)


WHY_NOT = why_not()


class Skipped(pytest.Module):
    """A file that is not even imported."""

    def collect(self) -> Iterator[Any]:
        pytest.skip(WHY_NOT, allow_module_level=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if WHY_NOT else None


@pytest.fixture(scope="session", autouse=True)
def kernels_in_use() -> None:
    """FlashInfer loads what was compiled ahead, before anything imports it."""
    from daemon.engine.cuda import kernels

    where, reason = _kernels()
    assert where is not None, reason
    kernels.use(where)


@pytest.fixture
def remark() -> Any:
    """Put a line into the summary."""
    return REMARKS.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if REMARKS:
        terminalreporter.section("measured on the way")
        for line in REMARKS:
            terminalreporter.write_line(line)
