from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvpool.cuda_harness import CudaHarness, PeerProcess, open_harness
from tests.kvpool.device_peer import BLOCK


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake CUDA runtime as a shared library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("cudart") / "libfake.so"
    source = Path(__file__).with_name("fake_cudart.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-fPIC", "-shared", "-pthread", source, "-o", library], check=True)
    return library


@pytest.fixture
def harness(compiled: Path, tmp_path: Path) -> Iterator[CudaHarness]:
    with open_harness(compiled, tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def pair(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CudaHarness, PeerProcess]]:
    """A harness and one peer for many pushes, with small slices of an odd size."""
    with open_harness(compiled, tmp_path_factory.mktemp("pair")) as opened:
        opened.replace_transport(slice_bytes=3 * BLOCK // 2, slice_copies=3)
        yield opened, opened.start_peer()
