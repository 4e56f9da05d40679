"""Tests of the CUDA engine that need a CUDA device and compiled kernels.

    .venv/bin/python -m pytest tests/gpu -rs

Without a device or kernels they are skipped, with the reason. Cheap and basic files run first (`ORDER`), so the first
failure is the most useful one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HEAD_DIMS = (64, 128)  # of the models in these tests
FIGURES: list[str] = []  # measured by the tests, printed at the end of the report
ORDER = (
    "test_gpu_ops.py",
    "test_gpu_attention.py",
    "test_gpu_plans.py",
    "test_gpu_products.py",
    "test_gpu_sampling.py",
    "test_gpu_graphs.py",
    "test_gpu_overlap.py",
    "test_gpu_mixed.py",
    "test_gpu_agreement.py",
    "test_gpu_families.py",
    "test_gpu_fp8.py",
    "test_gpu_out_of_memory.py",
    "test_gpu_daemon.py",
)
"""Files in the order in which they run: a file comes after those that test its parts. Other files come last."""


def missing_requirement() -> str:
    """Return what is missing on this machine, or "" if nothing is. Without a driver, do not import torch."""
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        return "no CUDA device: there is no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return "PyTorch is the build for the CPU; LLUMD_TORCH=cuda bin/test installs the build for CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device: PyTorch finds none"
    return _kernels()[1]


def _kernels() -> tuple[Path | None, str]:
    """Return the directory of the kernels for device 0, or None and the reason why they cannot be used."""
    import torch

    from daemon.engine.cuda import kernels
    from tests.gpu.parts import model_config_of

    arch = kernels.arch_of(*torch.cuda.get_device_capability(0))
    configs = [model_config_of(head_dim) for head_dim in HEAD_DIMS]
    try:
        specs = [
            spec
            for config in configs
            for kv in ("auto", "fp8")
            for spec in kernels.required(config, arch=arch, kv_dtype=kv)
        ]
        return kernels.check({spec.name: spec for spec in specs}.values(), arch), ""
    except kernels.KernelError as e:
        return None, str(e)


MISSING = missing_requirement()


class SkippedFile(pytest.Module):
    """A test file that is skipped without being imported."""

    def collect(self) -> Iterator[Any]:
        pytest.skip(MISSING, allow_module_level=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedFile.from_parent(parent, path=module_path) if MISSING else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this directory as `gpu`, and sort the files by `ORDER`. Other tests keep their places."""
    places = [i for i, item in enumerate(items) if HERE in item.path.parents]
    for place, item in zip(places, sorted((items[i] for i in places), key=_rank), strict=True):
        item.add_marker(pytest.mark.gpu)
        items[place] = item


def _rank(item: pytest.Item) -> int:
    name = item.path.name
    return ORDER.index(name) if name in ORDER else len(ORDER)


@pytest.fixture(scope="session", autouse=True)
def kernels_in_use() -> None:
    """Make FlashInfer load the compiled kernels. This runs before any import of FlashInfer."""
    from daemon.engine.cuda import kernels

    where, reason = _kernels()
    assert where is not None, reason
    kernels.use(where)


@pytest.fixture
def report_figure() -> Any:
    """Return a function that adds a line to the summary."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
